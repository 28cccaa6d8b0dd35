"""The commands that mend, slim and join checkpoints: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.options import JSON, LOCAL_CHECKPOINT, LOCAL_PATH, OUTPUT_PATH, RUN
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned, Progress
from ckpt.cli.results.upkeep import (
    AdoptionEntry,
    AdoptResult,
    CollectResult,
    DoctorResult,
    FindingEntry,
    SlimResult,
)
from converters.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.runs.run import Run
    from ckpt.runs.upkeep.adoption import AdoptionOutcome
    from ckpt.runs.upkeep.collect import Collection
    from ckpt.runs.upkeep.findings import Finding
    from ckpt.runs.upkeep.slim import Slimming


@click.command(short_help="Find, and mend, what a crash left.")
@RUN
@click.option("--fix", is_flag=True, help="Put right what can be.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Commit whole checkpoints that were written without ckpt; nothing else is done.",
)
@dry_run_option("With --fix or --adopt: say what would be done, and do nothing.")
@JSON
def doctor(run: Path, fix: bool, adopt: bool, dry_run: bool, as_json: bool) -> None:
    """Find what a crash left: pointers that lead nowhere, leftovers, torn folders.

    With --fix pointers are rewritten, leftovers of saves, conversions and deletions
    that nobody works on are removed, and folders that no resume could read are renamed
    to .NAME.torn. Exit code 1 if anything is left to put right.

    \b
    ckpt doctor out
    ckpt doctor out --fix
    ckpt doctor out --adopt
    """
    from ckpt.runs import user_paths

    if fix and adopt:
        raise click.UsageError("--adopt and --fix are two steps; adopt first.")

    opened_run = user_paths.run_at(run, "ckpt doctor")
    work = _adoption(opened_run) if adopt else _mending(opened_run)
    planned.run(work, dry_run=dry_run or not (fix or adopt), as_json=as_json)


def _mending(run: Run) -> Planned:
    from ckpt.runs.upkeep import doctor as mending

    def execute(_: Progress) -> Output:
        mended, remaining = mending.mend(run)
        return _findings(run, mended, remaining, dry_run=False)

    return Planned(
        preview=lambda: _findings(run, [], mending.diagnose(run), dry_run=True),
        execute=execute,
    )


def _findings(
    run: Run, mended: Sequence[Finding], remaining: Sequence[Finding], dry_run: bool
) -> Output:
    lines = [
        f"mended\t{finding.path}: {finding.what}; --fix: {finding.remedy}" for finding in mended
    ]
    for finding in remaining:
        remedy = f"; --fix: {finding.remedy}" if finding.remedy else ""
        lines.append(f"found\t{finding.path}: {finding.what}{remedy}")

    entries = [
        FindingEntry(finding.path, finding.what, finding.remedy, is_mended)
        for findings, is_mended in ((mended, True), (remaining, False))
        for finding in findings
    ]
    return Output(
        DoctorResult(dry_run, tuple(entries)),
        lines,
        _idle(run, [] if entries else ["nothing to mend"]),
        exit_code=1 if remaining else 0,
    )


def _idle(run: Run, reasons: Sequence[str]) -> Sequence[str]:
    """Lines on why there is nothing to do; of a folder without checkpoints what lies there."""
    from ckpt.runs import user_paths

    absence = user_paths.absence(run.path, user_paths.RUN) if reasons else []
    return absence or [f"ckpt: {run.path}: {reason}" for reason in reasons]


def _adoption(run: Run) -> Planned:
    from ckpt.runs.upkeep import adoption

    return Planned(
        preview=lambda: _adopted(run, adoption.adopt(run, dry_run=True), dry_run=True),
        execute=lambda _: _adopted(run, adoption.adopt(run), dry_run=False),
    )


def _adopted(run: Run, outcomes: Sequence[AdoptionOutcome], dry_run: bool) -> Output:
    verb = "would adopt" if dry_run else "adopted"
    lines = [
        f"{verb}\t{outcome.folder}" if outcome.adopted else f"not adopted\t{outcome.reason}"
        for outcome in outcomes
    ]
    return Output(
        AdoptResult(
            dry_run,
            tuple(
                AdoptionEntry(outcome.folder, outcome.adopted, outcome.reason)
                for outcome in outcomes
            ),
        ),
        lines,
        _idle(run, [] if outcomes else ["every checkpoint has its manifest"]),
        exit_code=0 if all(outcome.adopted for outcome in outcomes) else 1,
    )


@click.command(short_help="Make a full checkpoint a weights-only one.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be removed, and remove nothing.")
@click.option("--force", is_flag=True, help="Even the newest full one, or a pinned one.")
@JSON
def slim(checkpoint: Path, dry_run: bool, force: bool, as_json: bool) -> None:
    """Make a full checkpoint a weights-only one.

    The weights beside DeepSpeed's files are proven complete first: every name and
    shape, every byte by its digest. Training cannot go on from a weights-only
    checkpoint.

    \b
    ckpt slim out/checkpoint-500 --dry-run
    ckpt slim out/checkpoint-500
    """
    from ckpt.runs import user_paths
    from ckpt.runs.upkeep import slim as slimming

    run_checkpoint = user_paths.checkpoint_at(checkpoint, "ckpt slim")
    user_paths.require_deepspeed(run_checkpoint)
    slimming_plan = slimming.plan(run_checkpoint, force)

    def execute(_: Progress) -> Output:
        slimming.execute(slimming_plan)
        return _slimmed(checkpoint, slimming_plan, dry_run=False)

    planned.run(
        Planned(
            preview=lambda: _slimmed(checkpoint, slimming_plan, dry_run=True),
            execute=execute,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _slimmed(folder: Path, slimming: Slimming, dry_run: bool) -> Output:
    from ckpt.text import size

    verb = "would remove" if dry_run else "removed"
    return Output(
        SlimResult(
            dry_run=dry_run,
            path=folder,
            proven=slimming.proven,
            deleted=slimming.removed,
            nbytes=slimming.nbytes,
        ),
        [f"{verb}\t{folder / name}" for name in slimming.removed],
        [f"ckpt: {'; '.join(slimming.proven)}; {size(slimming.nbytes)}"],
    )


@click.command(short_help="Join the parts of a checkpoint of several nodes.")
@click.argument(
    "folders",
    metavar="NODE_FOLDER...",
    nargs=-1,
    required=True,
    type=LOCAL_PATH,
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=OUTPUT_PATH,
    help="A new folder, or one of the NODE_FOLDERs, to which the other files are added.",
)
@dry_run_option("Say what would be copied, and copy nothing.")
@JSON
def collect(folders: tuple[Path, ...], output: Path, dry_run: bool, as_json: bool) -> None:
    """Join the parts of a checkpoint that lie on several nodes.

    Each NODE_FOLDER is a node's part of the same save. Every byte is verified, and the
    output appears all at once.

    \b
    ckpt collect node0/checkpoint-500 node1/checkpoint-500 -o out/checkpoint-500
    """
    from ckpt.runs.upkeep import collect as collecting

    collection = collecting.plan(folders, output)

    def execute(progress: Progress) -> Output:
        collecting.execute(collection, progress)
        return _collected(collection, dry_run=False)

    planned.run(
        Planned(
            preview=lambda: _collected(collection, dry_run=True),
            execute=execute,
            nbytes=collection.nbytes,
            title=output.name,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _collected(collection: Collection, dry_run: bool) -> Output:
    from ckpt.text import size

    outcome = "would be copied" if dry_run else "copied and verified"
    files = counted(len(collection.files), "file")
    return Output(
        CollectResult(
            dry_run=dry_run,
            output=collection.output,
            nbytes=collection.nbytes,
            sources={name: folder / name for name, folder in collection.files.items()},
        ),
        [collection.output],
        [f"ckpt: {files}, {size(collection.nbytes)} {outcome}"],
    )


COMMANDS = (doctor, slim, collect)
