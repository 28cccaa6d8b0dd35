"""The command ``ckpt diff``: parses, calls and prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.inspection import tables
from ckpt.cli.inspection.numbers import NO_VERIFY, STATE
from ckpt.cli.options import JSON, SourcePath, checkpoint_of
from ckpt.cli.planned import Output
from ckpt.cli.usage.command import Command
from converters.words import counted, shape

if TYPE_CHECKING:
    from ckpt.cli.results.inspection import DiffResult, DistanceEntry, InspectedSide
    from ckpt.inspection.comparison import CheckpointComparison, TensorPair
    from ckpt.inspection.contents import CheckpointTensors
    from converters.values.tensor_distance import TensorDistance

_HEADS = ("TENSOR", "TYPE", "SHAPE", "CHANGED", "MAX", "RELATIVE", "COSINE")
_EXACT_HEADS = ("TENSOR", "TYPE", "SHAPE", "CHANGED")


@click.command(cls=Command, short_help="Show how two checkpoints differ.")
@click.argument("first", metavar="A", type=SourcePath())
@click.argument("second", metavar="B", type=SourcePath())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@STATE
@click.option("--exact", is_flag=True, help="Compare bits, and types, in place of numbers.")
@click.option(
    "--tolerance",
    metavar="NUMBER",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="The largest difference of two numbers that counts as none.",
)
@click.option("--modules", is_flag=True, help="Print a line for each module, not each tensor.")
@click.option(
    "--depth",
    metavar="N",
    type=click.IntRange(1),
    help="With --modules: the modules of names with N parts.",
)
@click.option("--all", "lists_all", is_flag=True, help="Print what is the same in both, too.")
@NO_VERIFY
@JSON
@planned.opening_once
def diff(
    first: Path,
    second: Path,
    patterns: tuple[str, ...],
    state: str | None,
    exact: bool,
    tolerance: float,
    modules: bool,
    depth: int | None,
    lists_all: bool,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Show how checkpoint B differs from checkpoint A: in names and shapes of tensors, and how
    far their numbers are apart.

    Each is a checkpoint of a training, a model folder, or a file in safetensors or of
    torch.save, of any number of ranks. Each PATTERN chooses tensors by their names. Exit code
    1: they differ. A tensor whose numbers are those of the other, rounded to its own type, is
    the same unless --exact is given.

    \b
    ckpt diff out/checkpoint-400 out/checkpoint-500
    ckpt diff out/checkpoint-500 out/checkpoint-500-fp32 --exact
    ckpt diff base out/checkpoint-500 --modules --depth 3
    ckpt diff out/checkpoint-400 out/checkpoint-500 --state exp_avg '*lm_head*'
    """
    from ckpt.inspection import comparison, contents

    _require_one_way(exact, tolerance, modules, depth)
    paths = [checkpoint_of(path, None, False, "ckpt diff") for path in (first, second)]
    with (
        contents.opened(paths[0], state=state) as first_tensors,
        contents.opened(paths[1], state=state) as second_tensors,
    ):
        plan = comparison.plan(first_tensors, second_tensors, patterns)
        with planned.progress(plan.nbytes, paths[1].name) as advance:
            differences = comparison.execute(
                plan,
                is_exact=exact,
                tolerance=tolerance,
                verify=not no_verify,
                progress=advance,
            )

    result = _result(differences, depth)
    output = Output(
        result,
        _lines(result, modules, lists_all),
        [] if plan.sentence is None else [f"ckpt: {plan.sentence}"],
        exit_code=0 if result.equal else 1,
    )
    planned.show(output, as_json)


def _require_one_way(exact: bool, tolerance: float, modules: bool, depth: int | None) -> None:
    if exact and tolerance:
        raise click.UsageError("--exact compares bits, --tolerance numbers; use one of them.")
    if depth is not None and not modules:
        raise click.UsageError("--depth chooses modules; add --modules.")


def _result(differences: CheckpointComparison, depth: int | None) -> DiffResult:
    from ckpt.cli.results.inspection import DiffResult, ShapesEntry

    plan = differences.plan
    pairs = {pair.name: pair for pair in plan.pairs}
    first, second = map(_side, plan.sides)
    return DiffResult(
        equal=differences.is_same,
        exact=differences.is_exact,
        tolerance=differences.tolerance,
        first=first,
        second=second,
        names=plan.sentence,
        only_first=plan.only_first,
        only_second=plan.only_second,
        other_shapes={
            pair.name: ShapesEntry(first_shape=pair.first.shape, second_shape=pair.second.shape)
            for pair in plan.other_shapes
        },
        distances={
            name: _entry(differences, distance, pairs[name])
            for name, distance in differences.by_name.items()
        },
        modules={
            name: _entry(differences, distance)
            for name, distance in differences.by_module(depth).items()
        },
        all_distances=_entry(differences, differences.total),
        crc32_bytes=differences.verification.checked_bytes,
        unproven_bytes=differences.verification.unchecked_bytes,
    )


def _side(contents: CheckpointTensors) -> InspectedSide:
    from ckpt.cli.results.inspection import InspectedSide

    source = contents.source
    return InspectedSide(
        kind=source.kind,
        path=source.place.folder,
        tag=source.place.tag,
        step=source.step,
        values_of=contents.values_of,
    )


def _entry(
    differences: CheckpointComparison, distance: TensorDistance, pair: TensorPair | None = None
) -> DistanceEntry:
    from ckpt.cli.results.inspection import DistanceEntry

    types = () if pair is None else (pair.first.dtype.value, pair.second.dtype.value)
    has_numbers = distance.maximum is not None
    return DistanceEntry(
        dtypes=tuple(dict.fromkeys(types)),
        shape=None if pair is None else pair.first.shape,
        elements=distance.elements,
        changed=distance.unlike_bits if differences.is_exact else distance.changed,
        equal=None if pair is None else not differences.is_unlike(distance),
        rounded=bool(distance.changed) and distance.is_rounded,
        max_distance=distance.maximum,
        relative_distance=distance.relative if has_numbers else None,
        cosine_distance=distance.cosine if has_numbers else None,
    )


def _lines(result: DiffResult, by_modules: bool, lists_all: bool) -> Iterator[str]:
    """What differs, the distances as a table, and a summary in the last line."""
    yield from (f"only in A\t{name}" for name in result.only_first)
    yield from (f"only in B\t{name}" for name in result.only_second)
    for name, shapes in result.other_shapes.items():
        yield f"other shape\t{name}\t{shape(shapes.first_shape)}\t{shape(shapes.second_shape)}"

    entries = result.modules if by_modules else result.distances
    shown_entries = {
        name: entry for name, entry in entries.items() if lists_all or _is_shown(entry)
    }
    if shown_entries:
        heads = _EXACT_HEADS if result.exact else _HEADS
        rows = [_row(name, entry) for name, entry in shown_entries.items()]
        rows.append(_row("all", result.all_distances))
        yield from tables.lines(heads, [row[: len(heads)] for row in rows], left_columns=3)

    yield _summary(result)


def _is_shown(entry: DistanceEntry) -> bool:
    """Whether a tensor or a module is not the same in both, or not of one type."""
    return entry.equal is False or bool(entry.changed) or len(entry.dtypes) > 1


def _row(name: str, entry: DistanceEntry) -> list[str]:
    share = entry.changed / entry.elements if entry.elements else 0.0
    distances = (entry.max_distance, entry.relative_distance, entry.cosine_distance)
    return [
        name,
        "/".join(entry.dtypes) or "-",
        "-" if entry.shape is None else shape(entry.shape),
        "rounded" if entry.rounded else tables.percent(share),
        *map(tables.number, distances),
    ]


def _summary(result: DiffResult) -> str:
    """One line: the same, or how many tensors differ in what."""
    pairs = result.distances.values()
    unlike_count = sum(entry.equal is False for entry in pairs)
    rounded_count = sum(entry.rounded and not result.exact for entry in pairs)
    parts = [
        (len(result.only_first), "only in A"),
        (len(result.only_second), "only in B"),
        (len(result.other_shapes), "of another shape"),
        (unlike_count, "with other bits" if result.exact else "with other numbers"),
    ]
    rounding = f", {rounded_count:,} of them rounded" if rounded_count else ""
    same_count = len(result.distances) - unlike_count
    clauses = [f"{counted(count, 'tensor')} {words}" for count, words in parts if count]
    if same_count or not clauses:
        clauses.append(f"{counted(same_count, 'tensor')} the same{rounding}")

    return "; ".join(clauses)


COMMANDS = (diff,)
