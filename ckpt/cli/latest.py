"""The command ``ckpt latest``: which checkpoint a resume takes, and which newer ones not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ckpt.cli import planned
from ckpt.cli.options import JSON, RUN
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output
from ckpt.cli.results.runs import LatestResult, SkippedCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.runs.run import Run, RunCheckpoint


@click.command(short_help="Print the checkpoint that a resume takes.")
@RUN
@click.option("--best", is_flag=True, help="The one that the pointer best names.")
@click.option(
    "--set",
    "designation",
    metavar="CHECKPOINT",
    help="Make latest (with --best: best) name this committed checkpoint.",
)
@dry_run_option("With --set: say which checkpoint would be named, and write nothing.")
@JSON
def latest(run: Path, best: bool, designation: str | None, dry_run: bool, as_json: bool) -> None:
    """Print the newest committed full checkpoint, which a resume takes.

    Says on stderr why newer folders are passed over, and which of them a resume would
    take though they have no manifest. DeepSpeed itself goes by the file latest, which
    --set writes.

    \b
    ckpt latest out
    ckpt latest out --best
    ckpt latest out --set checkpoint-500
    """
    from ckpt.runs import user_paths

    opened_run = user_paths.run_at(run, "ckpt latest")
    pointer_name = "best" if best else "latest"
    passed_over: list[SkippedCheckpoint] = []
    notices: list[str] = []

    if designation is not None:
        checkpoint = _designated(opened_run, designation)
        if not dry_run:
            opened_run.point(pointer_name, checkpoint)
    elif best:
        checkpoint = _best(opened_run)
    else:
        passed_over = _passed_over(opened_run, opened_run.newest())
        checkpoint = _resumed(opened_run, passed_over, as_json)
        notices = [*_passed_over_lines(passed_over), *_mismatch(opened_run, checkpoint)]

    result = LatestResult(
        dry_run=dry_run,
        path=checkpoint.folder,
        step=checkpoint.step,
        pointer=opened_run.target(pointer_name),
        passed_over=tuple(passed_over),
    )
    planned.show(Output(result, [checkpoint.folder], notices), as_json)


def _best(run: Run) -> RunCheckpoint:
    """The checkpoint that the pointer best names; ``CheckpointError`` if it is not committed."""
    checkpoint = run.find("best")
    if checkpoint.why is not None:
        _refuse(
            f"{run.path / 'best'} names {checkpoint.name}, which is not committed: {checkpoint.why}"
        )
    return checkpoint


def _designated(run: Run, designation: str) -> RunCheckpoint:
    """The checkpoint of the run that a path, a name or a step means."""
    path = Path(designation)
    if len(path.parts) > 1 and path.resolve().parent != run.path.resolve():
        _refuse(f"{path} is not a checkpoint of {run.path}; a pointer names one of its own run")

    return run.find(path.resolve().name if len(path.parts) > 1 else designation)


def _resumed(run: Run, passed_over: Sequence[SkippedCheckpoint], as_json: bool) -> RunCheckpoint:
    """The checkpoint that a resume takes; ``CheckpointError``, after what it passes over, if
    there is none."""
    from ckpt.runs import user_paths

    newest = run.newest()
    if newest is None:
        for line in () if as_json else _passed_over_lines(passed_over):
            click.echo(line, err=True)
        if not run.checkpoints():
            raise user_paths.instead(run.path, user_paths.RUN)
        _refuse(f"{run.path} holds no committed full checkpoint; see ckpt ls {run.path}")

    return newest


def _passed_over_lines(passed_over: Sequence[SkippedCheckpoint]) -> list[str]:
    return [f"ckpt: passed over {entry.path}: {entry.reason}" for entry in passed_over]


def _refuse(reason: str) -> NoReturn:
    from converters.errors import CheckpointError

    raise CheckpointError(reason, "incomplete")


def _passed_over(run: Run, newest: RunCheckpoint | None) -> list[SkippedCheckpoint]:
    """The newer checkpoints that a resume does not take, and why."""
    from ckpt.runs.pruning import foreignness
    from ckpt.runs.run import members, order

    checkpoints = run.checkpoints()
    own_line = members(checkpoints)
    entries = []

    for checkpoint in checkpoints:
        if newest is not None and order(checkpoint) <= order(newest):
            continue
        reason = _why(checkpoint)

        is_committed = checkpoint.manifest is not None and checkpoint.committed
        if is_committed and checkpoint not in own_line:
            reason = foreignness(checkpoint, own_line)
        entries.append(SkippedCheckpoint(checkpoint.folder, reason))

    return entries


def _why(checkpoint: RunCheckpoint) -> str:
    """Why a checkpoint is not printed, or that a resume takes it without a manifest."""
    from ckpt.runs import manifest
    from ckpt.runs.foreign import completeness
    from converters.errors import CheckpointError

    if checkpoint.why != manifest.ABSENT:
        return str(checkpoint.unusable)

    try:
        proof = completeness.prove(checkpoint.folder)
    except CheckpointError as error:
        return str(error if error.kind == "unsupported" else checkpoint.why)

    if not proof.resumable:
        return str(checkpoint.why)
    return (
        f"it has no manifest.json, but is whole, by {proof.kind}: ckpt.find and ckpt.resume take "
        "it or say why not; ckpt doctor --adopt commits what DeepSpeed wrote"
    )


def _mismatch(run: Run, newest: RunCheckpoint) -> list[str]:
    """A line where the file latest names another checkpoint than a resume takes."""
    pointer_target = run.target("latest")
    if pointer_target is None or pointer_target == newest.pointer:
        return []
    return [
        f"ckpt: {run.path / 'latest'} names {pointer_target}, which DeepSpeed itself "
        f"would load; ckpt latest {run.path} --set {newest.name} changes it"
    ]
