"""Proof of a resharded checkpoint: read again from its files, it has every
element of the source.

The result is read as any checkpoint is. Where a tensor of it lies, the plan says
which bytes of the source were put; these must be the very bytes that the source
has for the tensor:

    result  --zero, groups-->  name -> bytes of the result  --plan-->  bytes of the source
    source  --zero, groups-->  name -> bytes of the source     and both are the same

So every parameter, every state of it, every frozen one and every buffer is proven by
its place, and the places by CRC32s: those of the source were checked on the way, those
of the result when it is read back (``read_back``). What resharding undoes is proven
along with that: cut up for the first topology again, the tensors are the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.execute.workers import Progress
from converters.extents import joined_runs
from converters.partitioned import Partitioned, RankVectors
from converters.plan import Placement, Plan
from converters.rank_cuts import Cuts, RankPart
from converters.source import Source
from converters.storage.checksums import Ledger
from converters.tensors import DType, Extent, TensorRef
from converters.torch_files import object_graph, reader
from converters.torch_files.object_graph import Storage
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import checkpoint as merged
from converters.zero.parallel.cuts import Cut
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup


class Provenance:
    """Leads from the files of a plan, in ``folder``, back to what they are made from."""

    def __init__(self, plan: Plan, folder: Path):
        self.places: dict[Path, tuple[list[int], list[Placement]]] = {}
        self.cuts: dict[int, tuple[RankVectors, Cuts | None]] = {}
        for shard in plan.shards:
            placements = sorted(
                (placement for placement in shard.placements if placement.nbytes),
                key=lambda placement: placement.offset,
            )
            offsets = [placement.offset for placement in placements]
            self.places[folder / shard.filename] = offsets, placements

    def source(self, tensor: TensorRef) -> TensorRef | None:
        """The bytes of the source that a tensor was made from, as a vector.

        ``None`` for a tensor without elements; ``CheckpointError`` for bytes that are
        not one tensor's, of one type.
        """
        cut_tensor = self._cut_tensor(tensor)
        if cut_tensor is not None:
            return cut_tensor

        parts: list[TensorRef] = []
        for extent in tensor.extents:
            parts += self._parts(extent, tensor)

        return TensorRef.concat(parts) if parts else None

    def _cut_tensor(self, tensor: TensorRef) -> TensorRef | None:
        """The tensor of the source that one of the result was cut out of, where all
        ranks have their equal pieces of it: so by arithmetic, without a look at each
        piece."""
        extents = tensor.extents
        if not isinstance(extents, Partitioned) or extents.start:
            return None

        vectors = extents.vectors
        if id(vectors) not in self.cuts:
            self.cuts[id(vectors)] = vectors, self._cuts_of(vectors, tensor.dtype)

        cuts = self.cuts[id(vectors)][1]
        index = cuts.index(extents.at, extents.run) if cuts is not None else None
        if cuts is None or index is None or cuts.tensors[index].nbytes != extents.nbytes:
            return None
        return TensorRef(tensor.dtype, (tensor.numel,), cuts.tensors[index])

    def _cuts_of(self, vectors: RankVectors, dtype: DType) -> Cuts | None:
        """What the vectors of all ranks were cut out of;
        ``None`` if it is not one thing."""
        cuts: Cuts | None = None
        for rank, vector in enumerate(vectors):
            offsets, placements = self.places[vector.path]
            placement = placements[bisect_right(offsets, vector.offset) - 1]
            part = placement.source.extents
            if not isinstance(part, RankPart) or placement.offset != vector.offset:
                return None

            cuts = cuts or part.cuts
            types = {placement.dtype, placement.source.dtype, dtype}
            if part.cuts is not cuts or part.rank != rank or len(types) != 1:
                return None

        return cuts if cuts is not None and cuts.rank_count == len(vectors) else None

    def _parts(self, extent: Extent, tensor: TensorRef) -> Iterator[TensorRef]:
        offsets, placements = self.places[extent.path]
        offset = extent.offset

        while offset < extent.end:
            placement = placements[bisect_right(offsets, offset) - 1]
            placement_end = placement.offset + placement.nbytes
            inside = placement.offset <= offset < placement_end
            if not inside or placement.dtype != tensor.dtype:
                raise CheckpointError(f"{extent.path} has no such tensor at byte {offset}; {BUG}")

            itemsize = placement.dtype.itemsize
            end = min(extent.end, placement_end)
            start = (offset - placement.offset) // itemsize
            yield placement.source.narrow(start, (end - offset) // itemsize)
            offset = end


def verify_tensors(
    source: Source,
    source_groups: Sequence[ParamGroup],
    result: Checkpoint,
    plan: Plan,
    folder: Path,
) -> dict[str, int]:
    """Counts of tensors that are equal.

    ``source_groups`` are the source's param groups in the target's order; ``result``
    was read from ``folder``, where the plan's files are. ``CheckpointError`` names the
    first thing that is not equal.
    """
    provenance = Provenance(plan, folder)
    counts = {"others": 0, "copies": len(result.weights.copies)}
    counts |= verify_groups(provenance, result, source_groups, merged.groups_of(result))

    source_weights, result_weights = source.weights, result.weights
    if (
        source_weights.tensors.keys() != result_weights.tensors.keys()
        or source_weights.aliases != result_weights.aliases
        or source_weights.buffers != result_weights.buffers
    ):
        raise _mismatch(result, "list of names")

    trained = {name for group in source_groups for name in group.shapes}
    for name in result_weights.tensors.keys() - trained:
        source_tensor = source_weights.tensors[name]
        _require(provenance, result, name, source_tensor, result_weights.tensors[name])
        counts["others"] += 1

    for name, reference in result_weights.copies.items():
        source_tensor = source_weights.copies.get(name, source_weights.tensors[name])
        _require(provenance, result, f"16-bit {name}", source_tensor, reference)

    return counts


def verify_groups(
    provenance: Provenance,
    result: Source,
    source_groups: Sequence[ParamGroup],
    result_groups: Sequence[ParamGroup],
) -> dict[str, int]:
    """Counts of parameters and states that are equal; ``CheckpointError`` as above."""
    counts = {"parameters": 0, "states": 0}
    if len(result_groups) != len(source_groups):
        raise _mismatch(result, "number of param groups")

    pairs = zip(source_groups, result_groups, strict=True)
    for index, (group, result_group) in enumerate(pairs):
        _verify_group(provenance, result, index, group, result_group)
        for key, values in group.values.items():
            counts["states" if key else "parameters"] += len(values)
    return counts


def verify_cuts(result: TensorParallelCheckpoint, layouts: Mapping[str, Cut]) -> None:
    """Raises unless the files of ``result`` say of every tensor that it is cut so."""
    for name, layout in layouts.items():
        stated = result.cuts.get(name)
        is_equal = (
            stated is not None
            and (stated.shape, stated.averages) == (layout.shape, layout.averages)
            and set(stated.pieces) == set(layout.pieces)
            and dict(stated.shard_shapes) == dict(layout.shard_shapes)
        )
        if not is_equal:
            raise CheckpointError(
                f"{result.place.folder}: how {name} is cut is not what the plan says; {BUG}"
            )


def _verify_group(
    provenance: Provenance,
    result: Source,
    index: int,
    group: ParamGroup,
    result_group: ParamGroup,
) -> None:
    """Raises unless two param groups have the same order, constants and tensors."""
    same_order = list(group.shapes) == list(result_group.shapes)
    if not same_order or group.keys != result_group.keys:
        raise _mismatch(result, f"order of param group {index}")

    for field in ("options", "constants"):
        if not _equal(provenance, getattr(group, field), getattr(result_group, field)):
            raise _mismatch(result, f"{field} of param group {index}")

    for key, values in group.values.items():
        for name, tensor in values.items():
            label = f"{key or 'fp32'} of {name}"
            _require(provenance, result, label, tensor, result_group.values[key][name])


def verify_metadata(
    provenance: Provenance,
    source_tree: Mapping[Any, Any],
    result_tree: Mapping[Any, Any],
    ignored_keys: set[str],
    path: Path,
) -> None:
    """Raises unless two trees of ``path`` have the same under every key.

    Under ``ignored_keys`` they may differ.
    """
    further_keys = [key for key in result_tree if key not in source_tree]
    for key in [*source_tree, *further_keys]:
        if key in ignored_keys:
            continue
        if not _equal(provenance, source_tree.get(key), result_tree.get(key)):
            raise CheckpointError(f"{path}: {key} is not what the source has; {BUG}")


def read_back(plan: Plan, folder: Path, progress: Progress = lambda _: None) -> int:
    """Reads every storage of the plan's files, compares its CRC32; gives the bytes."""
    total_bytes = 0
    for shard in plan.shards:
        file = reader.read(folder / shard.filename)
        checked_bytes, _ = Ledger().check(file.checksums)
        progress(checked_bytes)
        total_bytes += checked_bytes

    return total_bytes


BUG = "this is a fault of ckpt: please report it; the source is untouched"


def _mismatch(result: Source, label: str) -> CheckpointError:
    return CheckpointError(f"{result.place.folder}: the {label} is not that of the source; {BUG}")


def _require(
    provenance: Provenance,
    result: Source,
    label: str,
    expected: TensorRef,
    tensor: TensorRef,
) -> None:
    """Raises unless a tensor of the result was made from the bytes of ``expected``."""
    same_shape = expected.shape == tensor.shape
    if not same_shape or not same_place(_vector(expected), provenance.source(tensor)):
        raise _mismatch(result, label)


def _vector(tensor: TensorRef) -> TensorRef | None:
    """The elements one after another, as ``Provenance.source`` has them."""
    return TensorRef.concat([tensor]) if tensor.numel else None


def same_place(first: TensorRef | None, second: TensorRef | None) -> bool:
    """Whether two vectors are the very same bytes, in the same order."""
    if first is None or second is None:
        return first is second
    if first.dtype != second.dtype or first.numel != second.numel:
        return False
    # the runs are only gone through where they are not the same ones
    if first.extents == second.extents:
        return True
    pairs = zip_longest(joined_runs(first.extents), joined_runs(second.extents))
    return all(run == counterpart for run, counterpart in pairs)


def _equal(provenance: Provenance, source_tree: Any, result_tree: Any) -> bool:
    """Whether two trees are the same values, their storages made from the same bytes."""

    def made_from(source_storage: Storage, result_storage: Storage) -> bool:
        return source_storage.kind == result_storage.kind and same_place(
            _vector(source_storage.ref), provenance.source(result_storage.ref)
        )

    return object_graph.equal(source_tree, result_tree, made_from)
