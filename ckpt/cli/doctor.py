"""The command ``ckpt doctor``: what a crash left, and what was written without ckpt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.options import JSON, LOCAL_PATH
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned, Progress
from ckpt.cli.usage.command import Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.runs.run import Run
    from ckpt.runs.states.status import CheckpointStatus
    from ckpt.runs.upkeep.adoption import AdoptionOutcome
    from ckpt.runs.upkeep.doctor import Diagnosis
    from ckpt.runs.upkeep.findings import Finding


@click.command(cls=Command, short_help="Find, and mend, what a crash left.")
@click.argument("path", metavar="RUN|CHECKPOINT", type=LOCAL_PATH)
@click.option("--fix", is_flag=True, help="Put right what can be.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Commit complete checkpoints that were written without ckpt; nothing else is done.",
)
@click.option(
    "--now",
    "is_quiet",
    is_flag=True,
    help="With --adopt: do not wait for a second look, because nobody writes there.",
)
@click.option(
    "--one-save",
    is_flag=True,
    help="Say that all files of this checkpoint are of one save, where only their times speak "
    "against it; with --adopt, where their values do, too.",
)
@dry_run_option("With --fix, --adopt or --one-save: say what would be done, and do nothing.")
@JSON
@planned.opening_once
def doctor(
    path: Path,
    fix: bool,
    adopt: bool,
    is_quiet: bool,
    one_save: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find what a crash left: pointers that lead nowhere, leftovers, torn folders.

    With --fix pointers are rewritten, leftovers of saves, conversions and deletions
    that nobody works on are removed, and folders that no resume could read are renamed
    to .NAME.torn. Exit code 1 if anything is left to put right. Checkpoints that are
    complete need nothing: --adopt reads every byte of those that DeepSpeed, the Trainer,
    Accelerate or torch wrote, of a run or one, and commits them. Its exit code is 1 if
    one is not complete.

    A checkpoint that was copied or downloaded in parts can look like a save over an older
    one that was interrupted. Where its values cannot tell, it counts as incomplete until
    --one-save makes the file that is written last (trainer_state.json) the newest. Weights
    that were clipped or averaged in the model are not those of the optimizer's states:
    --adopt --one-save commits such a checkpoint as it is, and its manifest says so.

    \b
    ckpt doctor out
    ckpt doctor out --fix
    ckpt doctor out --adopt
    ckpt doctor out/checkpoint-500 --adopt --now
    ckpt doctor out/checkpoint-500 --one-save
    ckpt doctor out/checkpoint-500 --adopt --one-save
    """
    from ckpt.runs.states import listing

    if fix and adopt:
        raise click.UsageError("--adopt and --fix are two steps; adopt first.")
    if one_save and fix:
        raise click.UsageError("--one-save is a step of its own; use it before --fix.")
    if is_quiet and not adopt:
        raise click.UsageError("--now is for --adopt, which waits for whoever may be writing.")

    if adopt:
        output = _adoption(path, wait=not is_quiet, dry_run=dry_run, one_save=one_save)
        planned.show(output, as_json)
        return

    if one_save:
        planned.run(_settling(path), dry_run=dry_run, as_json=as_json)
        return

    opened_run = listing.run_at(path, "ckpt doctor")
    planned.run(_mending(opened_run), dry_run=dry_run or not fix, as_json=as_json)


def _mending(run: Run) -> Planned:
    from ckpt.runs.foreign import signs
    from ckpt.runs.upkeep import doctor as mending

    def execute(_: Progress) -> Output:
        mended, diagnosis = mending.mend(run)
        return _findings(run, mended, diagnosis, dry_run=False)

    def preview() -> Output:
        count = len(signs.candidates(run.path))
        with planned.progress(count, run.path.name, "checkpoint") as advance:
            diagnosis = mending.diagnose(run, advance)
        return _findings(run, [], diagnosis, dry_run=True)

    return Planned(preview=preview, execute=execute)


def _settling(path: Path) -> Planned:
    """Making the file that is written last the newest one of a checkpoint."""
    from ckpt.cli.results.upkeep import DoctorResult, FindingEntry
    from ckpt.runs.foreign import overwriting
    from ckpt.runs.states import listing

    checkpoint = listing.checkpoint_at(path, "ckpt doctor --one-save")
    doubt = overwriting.doubt(checkpoint.folder)

    def output(is_settled: bool) -> Output:
        if doubt is None:
            notice = f"ckpt: {path}: the times of its files are those of one save"
            return Output(DoctorResult(not is_settled, (), ()), [], [notice])

        remedy = f"make {doubt.mark.name} the newest file"
        finding = FindingEntry(doubt.mark, doubt.sentence, remedy, is_settled)
        line = f"{doubt.mark}: {doubt.sentence}; --one-save: {remedy}"
        word = "mended" if is_settled else "found"
        return Output(DoctorResult(not is_settled, (finding,), ()), [f"{word}\t{line}"])

    def execute(_: Progress) -> Output:
        if doubt is not None:
            overwriting.settle(doubt)
        return output(is_settled=True)

    return Planned(preview=lambda: output(is_settled=False), execute=execute)


def _findings(run: Run, mended: Sequence[Finding], diagnosis: Diagnosis, dry_run: bool) -> Output:
    from ckpt.cli import listing
    from ckpt.cli.results.upkeep import DoctorResult, FindingEntry

    lines = [
        f"mended\t{finding.path}: {finding.what}; done: {finding.remedy}" for finding in mended
    ]
    for finding in diagnosis.findings:
        remedy = f"; --fix: {finding.remedy}" if finding.remedy else ""
        lines.append(f"found\t{finding.path}: {finding.what}{remedy}")

    entries = [
        FindingEntry(finding.path, finding.what, finding.remedy, is_mended)
        for findings, is_mended in ((mended, True), (diagnosis.findings, False))
        for finding in findings
    ]
    complete = [status for status in diagnosis.statuses if status.complete]
    idle = [] if entries else ["nothing to mend"]

    return Output(
        DoctorResult(dry_run, tuple(entries), listing.untouched(complete)),
        lines,
        [*_idle(run.path, idle, diagnosis.statuses), *_hints(run, diagnosis.statuses)],
        exit_code=1 if diagnosis.findings else 0,
    )


def _hints(run: Run, statuses: Sequence[CheckpointStatus]) -> list[str]:
    """Lines on what is no finding: what is not committed, copies, other trainings."""
    from ckpt.runs import user_paths
    from ckpt.runs.states import copies, listing, trainings
    from ckpt.runs.upkeep.uncommitted_findings import adoption_hint

    native = [
        status for status in statuses if not (status.complete and status.checkpoint.is_universal)
    ]
    copied = copies.originals([status.checkpoint for status in statuses])
    saved = [status for status in native if status.checkpoint.folder not in copied]
    remarks = trainings.order_remarks(listing.ordered(native), run.path)
    lines = (*adoption_hint(saved, run.path), *copies.remarks(copied), *remarks)
    hints = [f"ckpt: {run.path}: {line}" for line in lines]
    hints += [f"ckpt: {line}" for line in listing.closed_lines(run.path)]
    hints += [f"ckpt: {line}" for line in user_paths.torn_remarks(run.path)]

    return [*hints, *_latest_of_weights(run, statuses)]


def _latest_of_weights(run: Run, statuses: Sequence[CheckpointStatus]) -> list[str]:
    """A line where the file latest names a checkpoint of weights alone."""
    from converters.words import shell_word

    pointed = run.pointer("latest")
    if pointed is None or not pointed.committed or pointed.tier != "weights":
        return []

    outcome = (
        "so that no training goes on from this run; a job that resumes from it stops and says so"
    )
    if any(status.whole and status.tier == "full" for status in statuses):
        outcome = f"so that a resume takes another one: ckpt latest {shell_word(run.path)} says it"
    return [f"ckpt: {run.path}: latest names {pointed.name}, which has weights only, {outcome}"]


def _idle(path: Path, reasons: Sequence[str], statuses: Sequence[CheckpointStatus]) -> list[str]:
    """Lines on why there is nothing to do;
    of a folder without checkpoints what lies there."""
    from ckpt.runs import user_paths
    from ckpt.runs.states.status import CheckpointState

    is_known = any(status.state is not CheckpointState.UNKNOWN for status in statuses)
    absence = user_paths.absence(path, user_paths.RUN) if reasons and not is_known else []
    return absence or [f"ckpt: {path}: {reason}" for reason in reasons]


def _adoption(path: Path, *, wait: bool, dry_run: bool, one_save: bool) -> Output:
    """Adopts the checkpoints at a path under two bars: one of checkpoints, one of bytes."""
    from ckpt.runs.states import copies, listing
    from ckpt.runs.upkeep import adoption

    if one_save:  # which is said of one checkpoint
        checkpoints = [listing.checkpoint_at(path, "ckpt doctor --adopt --one-save")]
    else:
        checkpoints = listing.checkpoints_at(path)
    copied = copies.originals(checkpoints)
    with planned.progress(len(checkpoints), path.name, "checkpoint") as advance:
        surveyed = adoption.survey(checkpoints, wait, advance, one_save)
    statuses = listing.ordered(listing.known(surveyed, path))
    with planned.progress(adoption.nbytes_of(statuses), path.name) as advance:
        outcomes = adoption.adopt(statuses, dry_run, advance, one_save)
    if one_save:  # which is said in vain where nothing can record it
        outcomes = [replace(outcome, failed=not outcome.adopted) for outcome in outcomes]

    output = _adopted(path, outcomes, dry_run)
    lines_on_copies = [f"ckpt: {path}: {line}" for line in copies.remarks(copied)]
    return replace(output, notices=[*output.notices, *lines_on_copies])


def _unproven(outcome: AdoptionOutcome, dry_run: bool) -> list[str]:
    """A line on what nothing was compared with in an adopted checkpoint."""
    from ckpt.runs.recognition import is_weights
    from ckpt.text import size
    from converters.words import some

    if not outcome.bare:
        return []

    largest = sorted(outcome.bare, key=lambda entry: -entry.nbytes)
    nbytes = sum(entry.nbytes for entry in largest)
    were = "would be" if dry_run else "were"
    line = (
        f"ckpt: {outcome.folder}: {size(nbytes)} had no checksum and {were} taken as they are "
        f"({some(entry.name for entry in largest)})"
    )
    proof = outcome.status.proof
    has_states_to_compare = proof is not None and proof.tag is not None
    if has_states_to_compare and any(is_weights(entry.name) for entry in largest):
        line += (
            "; of the weights a sample is compared with the states at most: ckpt verify --data "
            "compares all"
        )
    return [line]


def _remarks(outcome: AdoptionOutcome, dry_run: bool) -> list[str]:
    """Lines on what was not compared in an adopted checkpoint, and on what speaks
    against one save."""
    doubt = f"{outcome.doubt}; the manifest says that --one-save was given"
    lines = [f"ckpt: {outcome.folder}: {doubt}"] if outcome.doubt is not None else []
    return [*_unproven(outcome, dry_run), *lines]


def _without_latest(path: Path, outcomes: Sequence[AdoptionOutcome]) -> list[str]:
    """A line on what comes next,
    where a run has committed checkpoints now and no ``latest``."""
    from ckpt.runs.recognition import is_named_by_accelerate
    from ckpt.runs.run import Run
    from ckpt.runs.states import listing
    from converters.words import shell_word

    adopted = [outcome for outcome in outcomes if outcome.adopted]
    is_accelerates = all(is_named_by_accelerate(outcome.folder) for outcome in adopted)
    if is_accelerates or listing.is_single(path) or Run(path).target("latest") is not None:
        return []
    proofs = [outcome.status.proof for outcome in adopted]
    is_deepspeeds = any(proof is not None and proof.tag is not None for proof in proofs)
    reader = "DeepSpeed finds" if is_deepspeeds else "ckpt to-fp32 and others find"
    return [
        f"ckpt: {path} has no file latest, by which {reader} the newest one; "
        f"ckpt doctor {shell_word(path)} --fix writes it"
    ]


def _adopted(path: Path, outcomes: Sequence[AdoptionOutcome], dry_run: bool) -> Output:
    from ckpt.cli.results.upkeep import AdoptionEntry, AdoptResult
    from ckpt.runs.upkeep.uncommitted_findings import adoption_hint

    verb = "would adopt" if dry_run else "adopted"
    lines = [f"{verb}\t{outcome.folder}" for outcome in outcomes if outcome.adopted]
    lines += [f"not adopted\t{outcome.reason}" for outcome in outcomes if outcome.failed]
    foreign = [
        outcome.status
        for outcome in outcomes
        if not outcome.failed and not outcome.status.adoptable
    ]
    notes = [f"ckpt: {path}: {line}" for line in adoption_hint(foreign, path)]
    notes += [
        f"ckpt: {outcome.reason}"
        for outcome in outcomes
        if not (outcome.adopted or outcome.failed or outcome.status.complete)
    ]
    notes += [line for outcome in outcomes for line in _remarks(outcome, dry_run)]
    notes += [] if dry_run else _without_latest(path, outcomes)
    idle = [] if outcomes else ["every checkpoint has its manifest"]
    entries = tuple(
        AdoptionEntry(
            path=outcome.folder,
            adopted=outcome.adopted,
            state=outcome.status.state.value,
            written_by=outcome.status.writer,
            reason=outcome.reason,
            no_checksum_bytes=sum(entry.nbytes for entry in outcome.bare),
            doubt=outcome.doubt,
        )
        for outcome in outcomes
    )

    return Output(
        AdoptResult(dry_run, entries),
        lines,
        [*_idle(path, idle, [outcome.status for outcome in outcomes]), *notes],
        exit_code=1 if any(outcome.failed for outcome in outcomes) else 0,
    )
