"""Tables for a reader: aligned on a terminal, separated by tabs elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from converters.errors import one_line

_BARS = "▁▂▃▄▅▆▇█"
_MAX_BARS = 32  # powers of two in one picture; what is below them is in the first


def lines(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left_columns: int = 1
) -> list[str]:
    """The rows below their heads; the first columns flush left, numbers flush right."""
    if not sys.stdout.isatty():
        return ["\t".join(cells) for cells in (heads, *rows)]

    table = [[one_line(cell) for cell in cells] for cells in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [_aligned(cells, widths, left_columns) for cells in table]


def _aligned(cells: Sequence[str], widths: Sequence[int], left_columns: int) -> str:
    padded = [
        cell.ljust(width) if index < left_columns else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def number(value: float | None) -> str:
    """A number in four digits; a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def percent(share: float) -> str:
    """A part as percent, never rounded to none or all of it."""
    if 0 < share < 0.0001:
        return "<0.01%"
    return ">99.99%" if 0.9999 < share < 1 else f"{100 * share:.4g}%"


def bars(histogram: Mapping[int, int]) -> str:
    """A histogram by powers of two as a picture between its ends; a dash for an empty one."""
    if not histogram:
        return "-"

    low, high = min(histogram), max(histogram)
    first = max(low, high - _MAX_BARS + 1)
    counts = [histogram.get(power, 0) for power in range(first, high + 1)]
    counts[0] += sum(count for power, count in histogram.items() if power < first)
    top = max(counts)
    heights = [-(-count * len(_BARS) // top) for count in counts]
    picture = "".join(_BARS[height - 1] if height else " " for height in heights)
    return f"2^{low} {picture} 2^{high}"
