"""The shards of all tensor-parallel ranks as the weights of the model.

Names are merged one by one. A tied name shares its storage with another in every shard,
and takes that one's merged tensor; buffers are replicated. The 16-bit copies are cut as
their master weights are, and what several ranks have is compared while it is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from converters.errors import MalformedError
from converters.tensors import TensorRef, Weights
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.cuts import Cut

Shards = list[TensorRef | None]


def merged(lanes: Sequence[Weights], table: CutTable) -> tuple[Weights, dict[str, Cut]]:
    """The weights of the model, and how each of its tensors is cut.

    ``CheckpointError`` if shards do not fit together, or nothing says how they do.
    """
    table.buffers = frozenset(name for lane in lanes for name in lane.buffers)
    aliases = _aliases(lanes)
    cuts: dict[str, Cut] = {}
    tensors: dict[str, TensorRef] = {}
    copies: dict[str, TensorRef] = {}
    newer: dict[str, TensorRef] = {}

    for name in _names(lane.tensors for lane in lanes):
        if name in aliases:
            continue
        shards = [_shard(lane, name) for lane in lanes]
        layout = table.cut_of(name, [None if ref is None else ref.shape for ref in shards])
        if layout is None:
            continue

        cuts[name] = layout
        tensors[name] = _tensor(table, name, layout, shards)
        for values, refs in (
            (copies, [lane.copies.get(lane.aliases.get(name, name)) for lane in lanes]),
            (newer, [lane.newer.get(lane.aliases.get(name, name)) for lane in lanes]),
        ):
            if all(_is_there(ref, shard) for ref, shard in zip(refs, shards, strict=True)):
                values[name] = _tensor(table, name, layout, refs)

    table.require_known()
    return replace(_weights(lanes, tensors, copies, aliases), newer=newer), cuts


def _weights(
    lanes: Sequence[Weights],
    tensors: Mapping[str, TensorRef],
    copies: Mapping[str, TensorRef],
    aliases: Mapping[str, str],
) -> Weights:
    """All that the lanes know of the names, joined."""
    absent = {name: reason for lane in lanes for name, reason in lane.absent.items()}
    present_names = tensors.keys() | aliases.keys()
    checksums = {
        (checksum.extent.path, checksum.extent.offset): checksum
        for lane in lanes
        for checksum in lane.checksums
    }

    def of_any(names: Iterable[frozenset[str]]) -> frozenset[str]:
        return frozenset[str]().union(*names) & tensors.keys()

    trained = of_any(lane.trained for lane in lanes)
    # a rank that has no elements of a parameter counts it among those that are not
    # trained
    frozen = of_any(lane.frozen for lane in lanes) - trained

    return Weights(
        tensors,
        {alias: owner for alias, owner in aliases.items() if owner in tensors},
        of_any(lane.buffers for lane in lanes),
        {name: reason for name, reason in absent.items() if name not in present_names},
        copies,
        tuple(checksums[key] for key in sorted(checksums)),
        tuple(_names(lane.order for lane in lanes)),
        frozen,
        of_any(lane.packed for lane in lanes),
        trained,
        {name: owner for name, owner in lanes[0].lost_ties.items() if name not in present_names},
    )


def _names(names: Iterable[Iterable[str]]) -> dict[str, None]:
    """All names, in the order in which they come first."""
    return {name: None for each in names for name in each}


def _aliases(lanes: Sequence[Weights]) -> dict[str, str]:
    """Names that are tied to the same other one wherever a rank has elements of them."""
    aliases: dict[str, str] = {}
    for name in _names(lane.aliases for lane in lanes):
        owners = {
            lane.aliases.get(name, name)
            for lane in lanes
            if (ref := _shard(lane, name)) is not None and ref.numel
        }
        if len(owners) == 1 and name not in owners:
            aliases[name] = owners.pop()

    return aliases


def _shard(lane: Weights, name: str) -> TensorRef | None:
    """What a lane has of a name, tied or not."""
    return lane.tensors.get(lane.aliases.get(name, name))


def _is_there(copy: TensorRef | None, ref: TensorRef | None) -> bool:
    """Whether there is a copy of what a rank has, if it has any."""
    return copy is not None or ref is None or not ref.numel


def _tensor(
    table: CutTable, name: str, layout: Cut, shards: Sequence[TensorRef | None]
) -> TensorRef:
    """The shards put together; ``CheckpointError`` if they do not fit."""
    try:
        return layout.merged(shards)
    except MalformedError as error:
        raise table.fail(name, error) from error
