"""Tensors that are there twice: as parameters, and joined by a hook.

Both are the same bytes of the partitions (``cloned_parameters``), and a reader wants one
of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable

from converters.computing.computed import Computed
from converters.tensors import Extent, Weights

Runs = dict[str, list[tuple[int, int, str]]]  # by file: first byte, end, name; in order


def doubles(weights: Weights) -> frozenset[str]:
    """The trained tensors whose bytes overlap those of others, under another shape."""
    overlapping: set[str] = set()
    for runs in _runs(weights, weights.trained).values():
        last_name, end = "", 0
        for start, stop, name in runs:
            if start < end:
                overlapping |= {last_name, name}
            if stop > end:
                last_name, end = name, stop

    return frozenset(overlapping)


def holders(
    weights: Weights, names: Collection[str], others: Iterable[str]
) -> dict[str, list[str]]:
    """Those of ``names`` whose bytes lie in ``others``, with the ones they lie in."""
    runs = _runs(weights, others)
    holders_by_name: dict[str, list[str]] = {}
    for name in names:
        inside = [_inside(runs, extent) for extent in weights.tensors[name].extents]
        if all(inside):
            holders_by_name[name] = list(
                dict.fromkeys(holder_name for each in inside for holder_name in each)
            )

    return holders_by_name


def _inside(runs: Runs, extent: Extent) -> list[str]:
    """The tensors that a run of bytes lies in; none where a part of it lies in none."""
    file_runs = runs.get(str(extent.path), [])
    index = bisect_right(file_runs, extent.offset, key=lambda run: run[0]) - 1
    position, names = extent.offset, list[str]()
    for start, end, name in file_runs[max(index, 0) :]:
        if start > position:
            break

        if end > position:
            names.append(name)
            position = end

        if position >= extent.end:
            return names

    return []


def _runs(weights: Weights, names: Iterable[str]) -> Runs:
    runs: Runs = {}
    for name in names:
        ref = weights.tensors.get(name)
        if ref is not None and not isinstance(ref, Computed) and isinstance(ref.extents, tuple):
            for extent in ref.extents:
                run = (extent.offset, extent.end, name)
                runs.setdefault(str(extent.path), []).append(run)

    for file_runs in runs.values():
        file_runs.sort()

    return runs
