"""The commands on runs: parse, call, print. Exit codes as in ``cli``; 1: something is not whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ckpt.runs import upkeep
from ckpt.terminal import CHECKPOINT, JSON, RUN, best_of, facts_as_json, progress

if TYPE_CHECKING:
    from ckpt.runs.retention import Best
    from ckpt.runs.run import Checkpoint, Run


@click.command()
@RUN
@JSON
def ls(run: Path, as_json: bool) -> None:
    """List the checkpoints of a run, the newest last.

    Step, name, tier, size, age, metrics, marks (latest, best, pinned, in use) and tag; of those
    that are not committed, why. Sizes of files are compared with the manifest, no bytes are read.
    Says on stderr which job saves there right now.

    \b
    ckpt ls out
    ckpt ls out --json
    """
    from ckpt.runs import lease_watch, listing, verify
    from ckpt.runs.run import Run

    checkpoints = verify.chosen(run)
    folders = {checkpoint.folder.parent for checkpoint in checkpoints}
    folder = folders.pop() if folders else run
    found = listing.facts(Run(folder), checkpoints)
    if (writer := lease_watch.describe(folder)) is not None:
        click.echo(f"ckpt: {folder}: {writer}", err=True)
    if as_json:
        click.echo(facts_as_json(found))
        return
    for line in listing.lines(found):
        click.echo(line)
    if not found:
        click.echo(f"ckpt: {run} holds no checkpoints", err=True)


@click.command()
@click.argument("path", metavar="CHECKPOINT|RUN", type=click.Path(path_type=Path))
@click.option("--data", is_flag=True, help="Read every byte and compare it with its digest.")
@JSON
def verify(path: Path, data: bool, as_json: bool) -> None:
    """Check that a checkpoint, or every one of a run, is whole.

    Compares the files' sizes with the manifest and reads the headers of DeepSpeed's files. Without
    a manifest only the latter can be done, and the checkpoint does not count as whole.

    \b
    ckpt verify out/checkpoint-500
    ckpt verify out --data
    """
    from ckpt.runs import verify as checking

    checkpoints = checking.chosen(path)
    total = sum(c.nbytes for c in checkpoints if c.manifest) if data else 0
    with progress(total, path.name) as moved:
        verdicts = [checking.verify(checkpoint, data, moved) for checkpoint in checkpoints]
    if as_json:
        click.echo(facts_as_json([verdict.facts() for verdict in verdicts]))
    else:
        for verdict in verdicts:
            folder = verdict.checkpoint.folder
            click.echo(f"{folder}: {'whole' if verdict.whole else 'not whole'}")
            for line in (*verdict.problems, *verdict.proven):
                click.echo(f"  {line}")
    if not verdicts:
        click.echo(f"ckpt: {path} holds no checkpoints", err=True)
    if not verdicts or not all(verdict.whole for verdict in verdicts):
        sys.exit(1)


@click.command()
@RUN
@click.option("--keep-last", metavar="N", type=click.IntRange(1), help="Keep the N newest.")
@click.option(
    "--keep-every", metavar="N", type=click.IntRange(1), help="Keep those whose step N divides."
)
@click.option(
    "--keep-best",
    metavar="METRIC:MODE:N",
    callback=best_of,
    help="Keep the N best by a metric, such as eval_loss:min:2.",
)
@click.option(
    "--others",
    is_flag=True,
    help="Delete the checkpoints of other runs, and those that the run went back from.",
)
@click.option("--run", "run_id", metavar="ID", help="With --others: only those of this run.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@JSON
def prune(
    run: Path,
    run_id: str | None,
    others: bool,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: Best | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete committed checkpoints that no rule keeps.

    The newest, the newest full one, the best, what latest or best names, what is pinned and what a
    conversion reads are always kept. What is not committed is not touched (see ckpt doctor).
    Where the folder has checkpoints of several runs, the rules count those of the run that saved
    last, and the others stay; --others deletes them.

    \b
    ckpt prune out --keep-last 3 --keep-every 1000 --keep-best eval_loss:min:2 --dry-run
    ckpt prune out --keep-last 3
    ckpt prune out --others --dry-run
    """
    from ckpt.report import size
    from ckpt.runs import pruning
    from ckpt.runs.retention import Retention
    from ckpt.runs.run import Run

    rules = keep_last or keep_every or keep_best
    if others and rules:
        raise click.UsageError("--others and --keep-... are two steps; use one of them.")
    if run_id is not None and not others:
        raise click.UsageError("--run says which run --others deletes; add --others.")
    if not rules and not others:
        raise click.UsageError(
            "Say what to keep: --keep-last, --keep-every or --keep-best; or --others."
        )
    if others:
        done = pruning.prune_others(Run(run), run_id, dry_run)
    else:
        done = pruning.prune(Run(run), Retention(keep_last, keep_every, keep_best), dry_run)
    if as_json:
        entries = [
            {"folder": str(o.checkpoint.folder), "kept": o.kept, "why": o.why, "nbytes": o.nbytes}
            for o in done
        ]
        click.echo(facts_as_json({"dry_run": dry_run, "checkpoints": entries}))
        return
    gone = "would delete" if dry_run else "deleted"
    for o in done:
        said = "kept" if o.kept else gone
        click.echo(f"{said}\t{o.checkpoint.folder}\t{size(o.nbytes)}\t{o.why}")
    freed = sum(o.nbytes for o in done if not o.kept)
    click.echo(f"{size(freed)} {'would be freed' if dry_run else 'freed'}", err=True)


@click.command()
@CHECKPOINT
@JSON
def pin(checkpoint: Path, as_json: bool) -> None:
    """Keep a checkpoint whatever retention says.

    \b
    ckpt pin out/checkpoint-500
    """
    _pin(checkpoint, True, as_json)


@click.command()
@CHECKPOINT
@JSON
def unpin(checkpoint: Path, as_json: bool) -> None:
    """Leave a checkpoint to retention again.

    \b
    ckpt unpin out/checkpoint-500
    """
    _pin(checkpoint, False, as_json)


def _pin(folder: Path, pinned: bool, as_json: bool) -> None:
    from ckpt.runs import pruning
    from ckpt.runs.run import require_checkpoint

    pruning.pin(require_checkpoint(folder), pinned)
    said = facts_as_json({"folder": str(folder), "pinned": pinned})
    click.echo(said if as_json else f"{'pinned' if pinned else 'unpinned'}\t{folder}")


@click.command()
@RUN
@click.option("--best", is_flag=True, help="The one that the pointer best names.")
@click.option(
    "--set",
    "chosen",
    metavar="CHECKPOINT",
    help="Make latest (with --best: best) name this committed checkpoint.",
)
@JSON
def latest(run: Path, best: bool, chosen: str | None, as_json: bool) -> None:
    """Print the newest committed full checkpoint, which a resume takes.

    Says on stderr why newer folders are passed over, and which of them a resume would take though
    they have no manifest. DeepSpeed itself goes by the file latest, which --set writes.

    \b
    ckpt latest out
    ckpt latest out --best
    ckpt latest out --set checkpoint-500
    """
    from ckpt.runs.run import Run

    of, name = Run(run), "best" if best else "latest"
    talk: list[dict[str, str]] = []
    if chosen is not None:
        found = _named(of, chosen)
        of.point(name, found)
    elif best:
        found = of.find("best")
        if found.why is not None:
            _refuse(f"{run / 'best'} names {found.name}, which is not committed: {found.why}")
    else:
        found, talk = _resumed(of, quiet=as_json)
    held = {"checkpoint": str(found.folder), "step": found.step, "passed_over": talk}
    held["pointer"] = of.target(name)
    click.echo(facts_as_json(held) if as_json else found.folder)


def _named(run: Run, chosen: str) -> Checkpoint:
    """The checkpoint of the run that a path, a name or a step means."""
    path = Path(chosen)
    if len(path.parts) > 1 and path.resolve().parent != run.path.resolve():
        _refuse(f"{path} is no checkpoint of {run.path}; a pointer names one of its own run")
    return run.find(path.resolve().name if len(path.parts) > 1 else chosen)


def _resumed(run: Run, quiet: bool) -> tuple[Checkpoint, list[dict[str, str]]]:
    """The checkpoint that a resume takes, and the newer ones that it passes over, which it says."""
    newest = run.newest()
    talk = _passed_over(run, newest)
    for entry in () if quiet else talk:
        click.echo(f"ckpt: passed over {entry['folder']}: {entry['why']}", err=True)
    if newest is None:
        _refuse(f"{run.path} holds no committed full checkpoint; see ckpt ls {run.path}")
    if not quiet:
        _warn(run, newest)
    return newest, talk


def _refuse(why: str) -> NoReturn:
    from converters.errors import CheckpointError

    raise CheckpointError(why, "incomplete")


def _passed_over(run: Run, newest: Checkpoint | None) -> list[dict[str, str]]:
    from ckpt.runs.pruning import foreignness
    from ckpt.runs.run import members, order

    checkpoints = run.checkpoints()
    own = members(checkpoints)
    found = []
    for checkpoint in checkpoints:
        if newest is not None and order(checkpoint) <= order(newest):
            continue
        why = _why(checkpoint)
        if checkpoint.manifest is not None and checkpoint.committed and checkpoint not in own:
            why = foreignness(checkpoint, own)
        found.append({"folder": str(checkpoint.folder), "why": why})
    return found


def _why(checkpoint: Checkpoint) -> str:
    """Why it is not printed; one that a resume takes without a manifest is said to be such."""
    from ckpt.runs import completeness, manifest
    from converters.errors import CheckpointError

    if checkpoint.why != manifest.ABSENT:
        return str(checkpoint.unusable)
    try:
        proof = completeness.prove(checkpoint.folder)
    except CheckpointError:
        return str(checkpoint.why)
    if not proof.resumable:
        return str(checkpoint.why)
    return (
        f"no manifest.json, but whole, by {proof.kind}: ckpt.find and ckpt.resume take it or say "
        "why not; ckpt doctor --adopt commits what DeepSpeed wrote"
    )


def _warn(run: Run, newest: Checkpoint) -> None:
    named = run.target("latest")
    if named is not None and named != newest.pointer:
        click.echo(
            f"ckpt: {run.path / 'latest'} names {named}: DeepSpeed itself would take that; "
            f"ckpt latest {run.path} --set {newest.name} changes it",
            err=True,
        )


COMMANDS = (ls, verify, prune, pin, unpin, latest, *upkeep.COMMANDS)
