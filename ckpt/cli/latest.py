"""The command ``ckpt latest``:
which checkpoint a resume takes, and which newer ones not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ckpt.cli import planned
from ckpt.cli.options import JSON, RUN
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output
from ckpt.cli.usage.command import Command

if TYPE_CHECKING:
    from ckpt.cli.results.runs import SkippedCheckpoint
    from ckpt.runs.foreign.proofs import Proof
    from ckpt.runs.run import Run, RunCheckpoint
    from ckpt.runs.states.choice import Choice
    from ckpt.runs.states.status import CheckpointStatus


@click.command(cls=Command, short_help="Print the checkpoint that a resume takes.")
@RUN
@click.option(
    "--best",
    is_flag=True,
    help="The one that the pointer best names; without it the Trainer's own best.",
)
@click.option(
    "--set",
    "designation",
    metavar="CHECKPOINT",
    help="Make latest (with --best: best) name this committed checkpoint; latest only a full one.",
)
@dry_run_option("With --set: say which checkpoint would be named, and write nothing.")
@JSON
@planned.opening_once
def latest(run: Path, best: bool, designation: str | None, dry_run: bool, as_json: bool) -> None:
    """Print the checkpoint that a resume takes: what ckpt.find returns.

    That is the newest full one that is committed, or complete without a manifest, which
    stderr then says. stderr also says why newer ones are passed over. DeepSpeed itself
    goes by the file latest, which --set writes.

    \b
    ckpt latest out
    ckpt latest out --best
    ckpt latest out --set checkpoint-500
    """
    from ckpt.cli.results.runs import LatestResult
    from ckpt.runs.states import listing

    opened_run = listing.run_at(run, "ckpt latest")
    pointer_name = "best" if best else "latest"
    passed_over: list[SkippedCheckpoint] = []
    notices: list[str] = []
    proof: Proof | None = None

    if designation is not None:
        checkpoint = _designated(opened_run, designation)
        _require_committed(opened_run, pointer_name, checkpoint)
        if not dry_run:
            opened_run.point(pointer_name, checkpoint)
    elif best:
        checkpoint, proof = _best(opened_run)
        notices = _foreign_line(checkpoint, proof)
    else:
        with planned.announcements(as_json):
            choice = _choice(opened_run)
        assert choice.offer is not None
        checkpoint, proof = choice.offer.checkpoint, choice.offer.proof
        passed_over = _passed_over(choice, checkpoint)
        notices = [*_foreign_line(checkpoint, proof), *_mismatch(opened_run, checkpoint, proof)]

    result = LatestResult(
        dry_run=dry_run,
        path=checkpoint.folder,
        step=checkpoint.step if proof is None or proof.step is None else proof.step,
        state="committed" if proof is None else "complete",
        written_by=None if proof is None else proof.kind,
        pointer=opened_run.target(pointer_name),
        passed_over=tuple(passed_over),
    )
    planned.show(Output(result, [checkpoint.folder], notices), as_json)


def _choice(run: Run) -> Choice:
    """The checkpoint that a resume takes; ``CheckpointError`` if there is none yet, or
    none is usable."""
    from ckpt.runs import user_paths
    from ckpt.runs.states import choice, listing
    from converters.errors import CheckpointError
    from converters.words import shell_word

    answer = choice.choose(run.path)
    if answer.offer is not None:
        return answer
    if not listing.checkpoints_in(run.path):
        raise user_paths.instead(run.path, user_paths.RUN)

    raise CheckpointError(
        f"{run.path} holds weights only, which no training goes on from; see "
        f"ckpt ls {shell_word(run.path)}",
        "incomplete",
    )


def _best(run: Run) -> tuple[RunCheckpoint, Proof | None]:
    """The checkpoint that the pointer best names or, without it, that the Trainer calls
    its best; ``CheckpointError`` if it is neither committed nor complete."""
    if run.pointer("best") is None and (status := _best_of_trainer(run)) is not None:
        return status.checkpoint, status.proof

    checkpoint = run.find("best")
    if checkpoint.why is not None:
        _refuse(
            f"{run.path / 'best'} names {checkpoint.name}, which is not committed: {checkpoint.why}"
        )
    return checkpoint, None


def _best_of_trainer(run: Run) -> CheckpointStatus | None:
    """The best checkpoint by the trainer_state.json of the newest that has one; ``None`` if
    it names none that is here and whole."""
    from ckpt.runs.recognition import trainers_best
    from ckpt.runs.run import order
    from ckpt.runs.states import listing
    from ckpt.runs.states.status import status_of

    present = sorted(listing.checkpoints_in(run.path), key=order, reverse=True)
    name = trainers_best(checkpoint.folder for checkpoint in present)
    best = next((entry for entry in present if entry.name == name), None)
    status = status_of(best) if best is not None else None
    return status if status is not None and status.whole else None


def _designated(run: Run, designation: str) -> RunCheckpoint:
    """The checkpoint of the run that a path, a name or a step means."""
    path = Path(designation)
    if len(path.parts) > 1 and path.resolve().parent != run.path.resolve():
        _refuse(f"{path} is not a checkpoint of {run.path}; a pointer names one of its own run")

    return run.find(path.resolve().name if len(path.parts) > 1 else designation)


def _require_committed(run: Run, pointer_name: str, checkpoint: RunCheckpoint) -> None:
    """``CheckpointError`` where a pointer may not name the checkpoint, and what helps,
    if anything does."""
    from ckpt.runs import manifest as manifests
    from ckpt.runs.states import listing
    from ckpt.runs.states.status import status_of
    from converters.errors import CheckpointError

    if checkpoint.why == manifests.ABSENT:
        status = status_of(checkpoint)
        command = listing.adoption_command(checkpoint.folder)
        remedy = f"; {command} commits it" if status.adoptable else ""
        raise CheckpointError(
            f"{checkpoint.folder} is not committed ({status.description}); {pointer_name} names "
            f"committed checkpoints only and stays as it is{remedy}",
            "refused",
        )

    run.require_committed(pointer_name, checkpoint)
    if pointer_name == "latest" and checkpoint.tier == "weights":
        raise CheckpointError(
            f"{checkpoint.folder} has weights only, and no training goes on from them; latest "
            "stays as it is (--best names the best weights)",
            "refused",
        )


def _refuse(reason: str) -> NoReturn:
    from converters.errors import CheckpointError

    raise CheckpointError(reason, "incomplete")


def _passed_over(choice: Choice, checkpoint: RunCheckpoint) -> list[SkippedCheckpoint]:
    """The newer checkpoints that a resume does not take, and why."""
    from ckpt.cli.results.runs import SkippedCheckpoint
    from ckpt.runs.pruning import foreignness
    from ckpt.runs.run import order

    entries = [SkippedCheckpoint(entry.path, entry.why) for entry in choice.skipped]
    entries += [
        SkippedCheckpoint(newer.folder, foreignness(newer, [checkpoint]))
        for newer in choice.other_lines
        if order(newer) > order(checkpoint)
    ]

    return entries


def _foreign_line(checkpoint: RunCheckpoint, proof: Proof | None) -> list[str]:
    """A line where the checkpoint is not committed."""
    from ckpt.runs.states import listing, save_dirs
    from ckpt.runs.states.status import CheckpointState, CheckpointStatus
    from converters.words import shell_word

    if proof is None:
        return []

    status = CheckpointStatus(checkpoint, CheckpointState.COMPLETE, None, proof)
    commit = ""
    if status.adoptable:
        commit = f"; {listing.adoption_command(checkpoint.folder)} commits it"
    elif status.is_save_dir:
        shown_by = f"ckpt ls {shell_word(checkpoint.folder)}"
        commit = f"; it is {save_dirs.WHY}, which get no manifest: {shown_by}"
    return [
        f"ckpt: {checkpoint.folder} is complete, not committed: written by {proof.kind}{commit}"
    ]


def _mismatch(run: Run, checkpoint: RunCheckpoint, proof: Proof | None) -> list[str]:
    """A line where the file latest names another checkpoint than a resume takes."""
    from ckpt.runs.states import dangling
    from converters.words import shell_word

    pointer_target = run.target("latest")
    name = checkpoint.name
    expected = {checkpoint.pointer} if proof is None else {name, f"{name}/{proof.tag}"}
    if pointer_target is None or pointer_target in expected or checkpoint.folder == run.path:
        return []
    if (run.path / "latest").is_dir():  # somebody's link, which DeepSpeed does not read
        return []

    if dangling.finding(run.path) is not None:  # which was said with the choice
        return []
    remedy = ""
    if proof is None:
        remedy = f"; ckpt latest {shell_word(run.path)} --set {name} changes it"
    finding = "which DeepSpeed itself would load"
    return [f"ckpt: {run.path / 'latest'} names {pointer_target}, {finding}{remedy}"]
