"""The commands on runs: parse, call, print. Exit code 1: something is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.latest import latest
from ckpt.cli.options import JSON, LOCAL_CHECKPOINT, LOCAL_PATH, RUN, best_of
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned
from ckpt.cli.results.runs import (
    PinResult,
    PruneEntry,
    PruneResult,
    VerifyEntry,
    VerifyResult,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.runs.pruning import Outcome
    from ckpt.runs.retention import Best
    from ckpt.runs.verify import Verification


@click.command(short_help="List the checkpoints of a run.")
@RUN
@JSON
def ls(run: Path, as_json: bool) -> None:
    """List the checkpoints of a run, the newest last.

    Step, name, tier, size, age, metrics, marks (latest, best, pinned, in use) and tag;
    of those that are not committed, why. Sizes of files are compared with the manifest,
    no bytes are read. Says on stderr which job saves there right now.

    \b
    ckpt ls out
    ckpt ls out --json
    """
    from ckpt.cli import listing
    from ckpt.runs import user_paths
    from ckpt.runs.lease import watch
    from ckpt.runs.run import Run

    checkpoints = user_paths.checkpoints_at(run)
    folders = {checkpoint.folder.parent for checkpoint in checkpoints}
    folder = folders.pop() if folders else run
    if (writer := watch.describe(folder)) is not None:
        click.echo(f"ckpt: {folder}: {writer}", err=True)

    result = listing.facts(Run(folder), checkpoints)
    notices = user_paths.absence(run, user_paths.EITHER)
    planned.show(Output(result, listing.lines(result.checkpoints), notices), as_json)


@click.command(short_help="Check that checkpoints are whole.")
@click.argument("path", metavar="CHECKPOINT|RUN", type=LOCAL_PATH)
@click.option("--data", is_flag=True, help="Read every byte and compare it with its digest.")
@JSON
def verify(path: Path, data: bool, as_json: bool) -> None:
    """Check that a checkpoint, or every one of a run, is whole.

    Compares the files' sizes with the manifest and reads the headers of DeepSpeed's
    files. Without a manifest only the latter can be done, and the checkpoint does not
    count as whole.

    \b
    ckpt verify out/checkpoint-500
    ckpt verify out --data
    """
    from ckpt.runs import user_paths
    from ckpt.runs import verify as checking

    checkpoints = user_paths.checkpoints_at(path)
    total_bytes = sum(checkpoint.nbytes for checkpoint in checkpoints if checkpoint.manifest)
    with planned.progress(total_bytes if data else None, path.name) as advance:
        verdicts = [checking.verify(checkpoint, data, advance) for checkpoint in checkpoints]

    is_whole = bool(verdicts) and all(verdict.whole for verdict in verdicts)
    output = Output(
        VerifyResult(tuple(_verify_entry(verdict) for verdict in verdicts)),
        [line for verdict in verdicts for line in _verify_lines(verdict)],
        user_paths.absence(path, user_paths.EITHER),
        exit_code=0 if is_whole else 1,
    )
    planned.show(output, as_json)


def _verify_entry(verdict: Verification) -> VerifyEntry:
    return VerifyEntry(
        path=verdict.checkpoint.folder,
        step=verdict.checkpoint.step,
        committed=verdict.checkpoint.committed,
        whole=verdict.whole,
        checked="data" if verdict.data else "structure",
        problems=verdict.problems,
        proven=verdict.proven,
    )


def _verify_lines(verdict: Verification) -> list[str]:
    head = f"{verdict.checkpoint.folder}: {'whole' if verdict.whole else 'not whole'}"
    return [head, *(f"  {line}" for line in (*verdict.problems, *verdict.proven))]


@click.command(short_help="Delete checkpoints that no rule keeps.")
@RUN
@click.option("--keep-last", metavar="N", type=click.IntRange(1), help="Keep the N newest.")
@click.option(
    "--keep-every",
    metavar="N",
    type=click.IntRange(1),
    help="Keep every checkpoint whose step is a multiple of N.",
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
@dry_run_option("Say what would be deleted, and delete nothing.")
@JSON
def prune(
    run: Path,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: Best | None,
    others: bool,
    run_id: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete committed checkpoints that no rule keeps.

    The newest, the newest full one, the best, what latest or best names, what is pinned
    and what a conversion reads are always kept. What is not committed is not touched
    (see ckpt doctor). Where the folder has checkpoints of several runs, the rules count
    those of the run that saved last, and the others stay; --others deletes them.

    \b
    ckpt prune out --keep-last 3 --keep-every 1000 --keep-best eval_loss:min:2 --dry-run
    ckpt prune out --keep-last 3
    ckpt prune out --others --dry-run
    """
    from ckpt.runs import pruning, user_paths
    from ckpt.runs.retention import Retention

    _require_rules(bool(keep_last or keep_every or keep_best), others, run_id)
    opened_run = user_paths.run_at(run, "ckpt prune")
    absence = user_paths.absence(run, user_paths.RUN)
    if others:
        outcomes = pruning.plan_others(opened_run, run_id)
    else:
        outcomes = pruning.plan(opened_run, Retention(keep_last, keep_every, keep_best))

    planned.run(
        Planned(
            preview=lambda: _pruned(outcomes, absence, dry_run=True),
            execute=lambda _: _pruned(
                pruning.execute(opened_run, outcomes), absence, dry_run=False
            ),
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _require_rules(has_rules: bool, others: bool, run_id: str | None) -> None:
    if others and has_rules:
        raise click.UsageError("--others and --keep-... are two steps; use one of them.")
    if run_id is not None and not others:
        raise click.UsageError("--run says which run --others deletes; add --others.")
    if not has_rules and not others:
        raise click.UsageError(
            "Say what to keep: --keep-last, --keep-every or --keep-best; or --others."
        )


def _pruned(outcomes: Sequence[Outcome], absence: Sequence[str], dry_run: bool) -> Output:
    from ckpt.text import size

    entries = tuple(
        PruneEntry(outcome.checkpoint.folder, outcome.kept, outcome.reason, outcome.nbytes)
        for outcome in outcomes
    )
    freed_bytes = sum(entry.nbytes for entry in entries if not entry.kept)
    deletion = "would delete" if dry_run else "deleted"

    return Output(
        PruneResult(dry_run, entries, freed_bytes),
        [
            f"{'kept' if entry.kept else deletion}\t{entry.path}\t{size(entry.nbytes)}"
            f"\t{entry.reason}"
            for entry in entries
        ],
        [*absence, f"{size(freed_bytes)} {'would be freed' if dry_run else 'freed'}"],
    )


@click.command(short_help="Keep a checkpoint whatever retention says.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be marked, and mark nothing.")
@JSON
def pin(checkpoint: Path, dry_run: bool, as_json: bool) -> None:
    """Keep a checkpoint whatever retention says.

    \b
    ckpt pin out/checkpoint-500
    """
    _pin(checkpoint, pinned=True, dry_run=dry_run, as_json=as_json)


@click.command(short_help="Leave a checkpoint to retention again.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be unmarked, and unmark nothing.")
@JSON
def unpin(checkpoint: Path, dry_run: bool, as_json: bool) -> None:
    """Leave a checkpoint to retention again.

    \b
    ckpt unpin out/checkpoint-500
    """
    _pin(checkpoint, pinned=False, dry_run=dry_run, as_json=as_json)


def _pin(folder: Path, *, pinned: bool, dry_run: bool, as_json: bool) -> None:
    from ckpt.runs import pruning, user_paths

    verb = "pin" if pinned else "unpin"
    checkpoint = user_paths.checkpoint_at(folder, f"ckpt {verb}")

    def execute(_: object) -> Output:
        pruning.pin(checkpoint, pinned)
        return Output(PinResult(False, folder, pinned), [f"{verb}ned\t{folder}"])

    planned.run(
        Planned(
            preview=lambda: Output(PinResult(True, folder, pinned), [f"would {verb}\t{folder}"]),
            execute=execute,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


COMMANDS = (ls, latest, verify, prune, pin, unpin)
