"""Whether ``.metadata`` and ``__R.metadata`` of one folder describe one save.

``dcp.save`` with collectives leaves the files of a rank that a save without them wrote
before, and the other way round. The files of bytes have the same names in both, so that
the older description may fit their sizes and have the tensors in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from converters.dcp.entries.description import ItemPlace, Shape, StoredTensor
from converters.errors import CheckpointError
from converters.storage import stores
from converters.words import some, verb


class _Record(NamedTuple):
    """An item as it is described: whose it is, its type and box, and where it lies."""

    name: str
    dtype: str
    offsets: Shape
    sizes: Shape
    place: ItemPlace


class DescribedItems(NamedTuple):
    """All that a file describes."""

    path: Path
    items: frozenset[_Record]


def described(
    path: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, ItemPlace]
) -> DescribedItems:
    """The items that a file describes."""
    chunks = (
        _Record(name, tensor.dtype, chunk.offsets, chunk.sizes, chunk.place)
        for name, tensor in tensors.items()
        for chunk in tensor.chunks
    )
    values = (_Record(name, "", (), (), place) for name, place in objects.items())
    return DescribedItems(path, frozenset((*chunks, *values)))


def require_one_save(joint: DescribedItems, ranks: Iterable[DescribedItems]) -> None:
    """``CheckpointError`` unless the description
    of all ranks says what those of ranks say.

    It may leave out replicas: of these it has those of one rank.
    """
    by_rank = list(ranks)
    rank_items = frozenset[_Record]().union(*(rank.items for rank in by_rank))
    names = {item.name for item in joint.items}
    if joint.items <= rank_items and names == {item.name for item in rank_items}:
        return

    rank_names = some(rank.path.name for rank in by_rank)
    raise CheckpointError(
        f"{joint.path.parent} has {joint.path.name} and {rank_names}, which describe different "
        "saves: one with collectives, and one with use_collectives=False; "
        f"{_way(joint.path, [rank.path for rank in by_rank], rank_names)}"
    )


def _way(path: Path, rank_paths: list[Path], rank_names: str) -> str:
    """What to do, by the times of the files; a copy may have other times than the save."""
    joint_time = stores.status(path).modified_ns
    rank_times = [stores.status(rank_path).modified_ns for rank_path in rank_paths]
    if min(rank_times) <= joint_time <= max(rank_times):
        return "move away the description of the older save"

    number = len(rank_paths)
    if joint_time > max(rank_times):
        newer, be, older = path.name, "is", rank_names
    else:
        newer, be, older = rank_names, verb(number, "is", "are"), path.name
    return f"{newer} {be} newer by the time of the file: if the save was, too, move away {older}"
