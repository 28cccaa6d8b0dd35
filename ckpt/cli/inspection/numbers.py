"""The command ``ckpt stats``: parses, calls and prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.inspection import tables
from ckpt.cli.options import CHECKPOINT, JSON, LAST, TAG, checkpoint_of
from ckpt.cli.planned import Output
from ckpt.cli.usage.command import Command
from converters.words import counted, shape, some, verb

if TYPE_CHECKING:
    from ckpt.cli.results.inspection import NumbersEntry, StatsResult
    from ckpt.inspection.statistics import CheckpointStatistics, StatisticsPlan
    from converters.tensors import TensorRef
    from converters.values.tensor_statistics import TensorStatistics

STATE = click.option(
    "--state",
    metavar="KEY",
    help="Look at a state of the optimizer in place of the weights, such as exp_avg_sq.",
)
NO_VERIFY = click.option(
    "--no-verify",
    is_flag=True,
    help="Compare no checksums, nor what several ranks have of one tensor.",
)
_HEADS = ("TENSOR", "TYPE", "SHAPE", "MIN", "MAX", "MEAN", "STD", "NORM", "ZEROS", "NAN", "INF")


@click.command(cls=Command, short_help="Show what the numbers of each tensor are like.")
@CHECKPOINT
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@TAG
@LAST
@STATE
@click.option("--histogram", is_flag=True, help="Count the numbers by powers of two, too.")
@click.option(
    "--fail-on",
    type=click.Choice(["nan", "inf"]),
    multiple=True,
    help="Exit with 1 if there is one. May be repeated.",
)
@NO_VERIFY
@JSON
@planned.opening_once
def stats(
    checkpoint: Path,
    patterns: tuple[str, ...],
    tag: str | None,
    last: bool,
    state: str | None,
    histogram: bool,
    fail_on: tuple[str, ...],
    no_verify: bool,
    as_json: bool,
) -> None:
    """Show minimum, maximum, mean, standard deviation and norm of each tensor, and count
    zeros, NaN and infinities.

    CHECKPOINT is also a model folder, or a file in safetensors or of torch.save. Each PATTERN
    chooses tensors by their names, as in 'model.layers.0.*'. Everything is read once, in a
    few MB of memory.

    \b
    ckpt stats out/checkpoint-500
    ckpt stats out/checkpoint-500 '*norm*' --histogram
    ckpt stats out/checkpoint-500 --state exp_avg_sq
    ckpt stats out --last --fail-on nan --fail-on inf
    """
    from ckpt.inspection import contents, statistics

    checkpoint = checkpoint_of(checkpoint, tag, last, "ckpt stats")
    with contents.opened(checkpoint, tag, state) as opened:
        plan = statistics.plan(opened.with_only(patterns))
        with planned.progress(plan.nbytes, checkpoint.name) as advance:
            numbers = statistics.execute(
                plan, has_histogram=histogram, verify=not no_verify, progress=advance
            )

    result = _result(plan, numbers)
    failures = list(_failures(result, fail_on))
    planned.show(
        Output(
            result,
            _lines(result),
            [*_notices(result), *failures],
            exit_code=1 if failures else 0,
        ),
        as_json,
    )


def _result(plan: StatisticsPlan, statistics: CheckpointStatistics) -> StatsResult:
    from ckpt.cli.results.inspection import StatsResult

    source = plan.contents.source
    entries = {
        name: _entry(numbers, plan.tensors[name]) for name, numbers in statistics.by_name.items()
    }
    return StatsResult(
        kind=source.kind,
        path=source.place.folder,
        tag=source.place.tag,
        step=source.step,
        values_of=plan.contents.values_of,
        numbers_by_name=entries,
        all_numbers=_entry(statistics.total),
        unread=plan.unread,
        crc32_bytes=statistics.verification.checked_bytes,
        unproven_bytes=statistics.verification.unchecked_bytes,
    )


def _entry(numbers: TensorStatistics, ref: TensorRef | None = None) -> NumbersEntry:
    from ckpt.cli.results.inspection import NumbersEntry

    return NumbersEntry(
        dtype=None if ref is None else ref.dtype.value,
        shape=None if ref is None else ref.shape,
        elements=numbers.elements,
        minimum=numbers.minimum,
        maximum=numbers.maximum,
        mean=numbers.mean,
        std=numbers.std,
        norm=numbers.norm,
        zeros=numbers.zeros,
        nan_count=numbers.nan,
        inf_count=numbers.inf,
        histogram=numbers.histogram,
    )


def _lines(result: StatsResult) -> list[str]:
    """The table, with a line for all tensors at its end."""
    rows = [_row(name, entry) for name, entry in result.numbers_by_name.items()]
    rows.append(_row("all", result.all_numbers))
    has_histogram = result.all_numbers.histogram is not None
    heads = (*_HEADS, "MAGNITUDES") if has_histogram else _HEADS
    return tables.lines(heads, rows, left_columns=3)


def _row(name: str, entry: NumbersEntry) -> list[str]:
    ends = [tables.number(value) for value in (entry.minimum, entry.maximum)]
    sums = [tables.number(value) for value in (entry.mean, entry.std, entry.norm)]
    counts = [str(count) for count in (entry.zeros, entry.nan_count, entry.inf_count)]
    lengths = "-" if entry.shape is None else shape(entry.shape)
    picture = [] if entry.histogram is None else [tables.bars(entry.histogram)]
    return [name, entry.dtype or "-", lengths, *ends, *sums, *counts, *picture]


def _notices(result: StatsResult) -> Iterator[str]:
    """A line on tensors that were passed over."""
    if result.unread:
        name, reason = next(iter(result.unread.items()))
        tensors = counted(len(result.unread), "tensor")
        were = verb(len(result.unread), "was", "were")
        yield f"ckpt: {tensors} {were} not read, such as {name}: {reason}"


def _failures(result: StatsResult, fail_on: tuple[str, ...]) -> Iterator[str]:
    """A line for each sort of number that should not be there, and is."""
    for word, label in (("nan", "NaN"), ("inf", "infinite numbers")):
        names = _having(result.numbers_by_name, word)
        if word in fail_on and names:
            tensors = counted(len(names), "tensor")
            have = verb(len(names), "has", "have")
            yield f"ckpt: {tensors} of {result.path} {have} {label}: {some(names, 4)}"


def _having(entries: Mapping[str, NumbersEntry], word: str) -> list[str]:
    """The names of the tensors with NaN, or with infinities."""
    return [
        name
        for name, entry in entries.items()
        if (entry.nan_count if word == "nan" else entry.inf_count)
    ]


COMMANDS = (stats,)
