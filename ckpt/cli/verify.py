"""The command ``ckpt verify``, and the states of the checkpoints at a path."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.options import JSON, LOCAL_PATH, percentage
from ckpt.cli.planned import Output
from ckpt.cli.usage.command import Command

if TYPE_CHECKING:
    from ckpt.cli.results.runs import VerifyEntry
    from ckpt.runs.states.status import CheckpointStatus
    from ckpt.runs.states.verification import Depth, Reading, Verdict, VerificationPlan
    from ckpt.shares.company import Company
    from ckpt.shares.division import Division


@click.command(cls=Command, short_help="Check that checkpoints are whole.")
@click.argument("path", metavar="CHECKPOINT|RUN", type=LOCAL_PATH)
@click.option("--data", is_flag=True, help="Read every byte and compare it with its checksum.")
@click.option(
    "--sample",
    "percent",
    metavar="5%",
    callback=percentage,
    help="Read this part of the records and files, chosen at random.",
)
@click.option("--seed", metavar="N", type=click.IntRange(0), help="Choose the sample as before.")
@JSON
@planned.opening_once
@planned.launched
def verify(
    path: Path,
    data: bool,
    percent: float | None,
    seed: int | None,
    as_json: bool,
    division: Division | None,
) -> None:
    """Check that a checkpoint, or every one of a run, is whole.

    Compares the files' sizes with the manifest and reads the headers of DeepSpeed's
    files. Without a manifest, everything that its writer writes has to be there and
    whole by its form; --data then reads all bytes that have a CRC32 of their own, and
    says how many have none. Exit code 1: something is missing or damaged.

    \b
    ckpt verify out/checkpoint-500
    ckpt verify out --data
    ckpt verify out --sample 5%
    """
    from ckpt.cli.results.runs import VerifyResult
    from ckpt.runs import user_paths
    from ckpt.runs.states import verification

    company = None if division is None else division.company
    depth = _depth(data, percent, seed)
    if company is not None and percent is not None:
        depth = replace(depth, seed=company.of_first(depth.seed))
    statuses = statuses_at(path, takes_weights=True)
    with planned.progress(len(statuses), path.name, "checkpoint") as advance:
        plans = verification.plans(statuses, depth, advance)
    if company is not None:
        readings = _read_together(plans, company, path.name)
        if not company.is_first:
            return
        verdicts = [
            verification.execute(plan, reading=reading)
            for plan, reading in zip(plans, readings, strict=True)
        ]
    else:
        nbytes = sum(plan.nbytes for plan in plans)
        with planned.progress(nbytes or None, path.name) as advance:
            verdicts = [verification.execute(plan, advance) for plan in plans]
    verdicts = _with_values(verdicts, path.name)

    is_whole = bool(verdicts) and all(verdict.whole for verdict in verdicts)
    output = Output(
        VerifyResult(tuple(_verify_entry(verdict) for verdict in verdicts)),
        [line for verdict in verdicts for line in _verify_lines(verdict)],
        [] if verdicts else user_paths.absence(path, user_paths.EITHER),
        exit_code=0 if is_whole else 1,
    )
    planned.show(output, as_json)


def _read_together(plans: list[VerificationPlan], company: Company, title: str) -> list[Reading]:
    """What is wrong with the bytes of each checkpoint, of which every process reads a part."""
    from ckpt.runs.states import verification
    from ckpt.runs.states.verification import Reading

    company.require_same(repr([(plan.status.checkpoint.folder, plan.nbytes) for plan in plans]))
    share, total = company.share, sum(plan.nbytes for plan in plans)
    is_shown = company.is_first and total and sys.stderr.isatty()
    with (
        planned.progress(total if is_shown else None, title) as advance,
        company.step() as step,
        company.showing(advance if is_shown else None),
    ):
        readings = [
            verification.read_part(plan, share.number, share.count, company.progress)
            for plan in plans
        ]
        step.value = [[dict(reading.differences), reading.problems] for reading in readings]

    if company.is_first:
        for words in step.heard[1:]:
            readings = [
                reading.joined(Reading(differences, tuple(problems)))
                for reading, (differences, problems) in zip(readings, words, strict=True)
            ]
    return readings


def _with_values(verdicts: list[Verdict], title: str) -> list[Verdict]:
    """The verdicts,
    and of weights that lie beside states whether they have the same values."""
    from ckpt.runs.upkeep import stored_weights

    comparisons = [stored_weights.plans(verdict) for verdict in verdicts]
    nbytes = sum(comparison.nbytes for of_one in comparisons for comparison in of_one)
    with planned.progress(nbytes or None, title) as advance:
        return [
            stored_weights.execute(verdict, of_one, advance)
            for verdict, of_one in zip(verdicts, comparisons, strict=True)
        ]


def _depth(data: bool, percent: float | None, seed: int | None) -> Depth:
    """How much is to be read; a sample without a seed gets one,
    which is printed with it."""
    from random import SystemRandom

    from ckpt.runs.states.verification import Depth

    if data and percent is not None:
        raise click.UsageError("--data reads every byte, --sample a part; use one of them.")
    if seed is not None and percent is None:
        raise click.UsageError("--seed chooses a sample; add --sample, such as --sample 5%.")

    return Depth(data, percent, SystemRandom().randrange(1_000_000) if seed is None else seed)


def _verify_entry(verdict: Verdict) -> VerifyEntry:
    from ckpt.cli.results.runs import VerifyEntry

    status, depth = verdict.status, verdict.depth
    return VerifyEntry(
        path=status.checkpoint.folder,
        step=status.step,
        committed=status.checkpoint.committed,
        state=status.state.value,
        written_by=status.writer,
        whole=verdict.whole,
        checked=depth.word,
        checked_bytes=verdict.checked_bytes,
        no_checksum_bytes=verdict.bare_bytes,
        sample=depth.percent,
        seed=None if depth.percent is None else depth.seed,
        problems=verdict.problems,
        proven=verdict.proven,
    )


def _verify_lines(verdict: Verdict) -> list[str]:
    folder = verdict.status.checkpoint.folder
    head = f"{folder}: {'whole' if verdict.whole else 'not whole'}"
    return [head, *(f"  {line}" for line in (*verdict.problems, *verdict.proven))]


def statuses_at(path: Path, takes_weights: bool = False) -> list[CheckpointStatus]:
    """The checkpoints at a path with their states, the newest last, under a bar.

    With ``takes_weights`` also what ``ckpt to-fp32`` wrote.
    """
    from ckpt.runs.conversions import conversion_in
    from ckpt.runs.states import listing, status

    is_converted = takes_weights and path.is_dir() and conversion_in(path) is not None
    checkpoints = [listing.candidate(path)] if is_converted else listing.checkpoints_at(path)
    with planned.progress(len(checkpoints), path.name, "checkpoint") as advance:
        statuses = status.statuses_of(checkpoints, progress=advance, keeps_unread=True)

    return listing.ordered(listing.known(statuses, path))
