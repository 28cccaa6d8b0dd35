"""Proof of a resharded checkpoint: read again from its files, it has every element of the source.

The result is read as any checkpoint is. Where a tensor of it lies, the plan says which bytes of the
source were put; these must be the very bytes that the source has for the tensor:

    result  --zero, groups-->  name -> bytes of the result  --plan-->  bytes of the source
    source  --zero, groups-->  name -> bytes of the source     and both are the same

So every parameter, every state of it, every frozen one and every buffer is proven by its place, and
the places by CRC32s: those of the source were checked on the way, those of the result by ``data``.
What resharding undoes is proven along with that: cut up for the first topology again, the tensors
are the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import groups, torchzip, trees
from converters.errors import CheckpointError
from converters.groups import Group
from converters.ledger import Ledger
from converters.mover import Progress
from converters.plan import Placement, Plan
from converters.tensors import Extent, TensorRef
from converters.trees import Storage
from converters.zero import Checkpoint


class Retrace:
    """Leads from the files of a plan, in ``folder``, back to what they were made from."""

    def __init__(self, plan: Plan, folder: Path):
        self.places: dict[Path, tuple[list[int], list[Placement]]] = {}
        for shard in plan.shards:
            placed = sorted((p for p in shard.placements if p.nbytes), key=lambda p: p.offset)
            self.places[folder / shard.filename] = ([p.offset for p in placed], placed)

    def source(self, ref: TensorRef) -> TensorRef | None:
        """The bytes of the source that a tensor of the result was made from, as a vector.

        ``None`` for a tensor without elements; ``CheckpointError`` for bytes that are not one
        tensor's, of one type.
        """
        parts = [part for extent in ref.extents for part in self._parts(extent, ref)]
        return TensorRef.concat(parts) if parts else None

    def _parts(self, extent: Extent, ref: TensorRef) -> Iterator[TensorRef]:
        offsets, placed = self.places[extent.path]
        at = extent.offset
        while at < extent.end:
            found = placed[bisect_right(offsets, at) - 1]
            size = found.dtype.itemsize
            if not found.offset <= at < found.offset + found.nbytes or found.dtype != ref.dtype:
                raise CheckpointError(f"{extent.path} has no such tensor at byte {at}; {_BUG}")
            end = min(extent.end, found.offset + found.nbytes)
            yield found.source.narrow((at - found.offset) // size, (end - at) // size)
            at = end


def prove(
    source: Checkpoint, before: Sequence[Group], result: Checkpoint, plan: Plan, folder: Path
) -> dict[str, int]:
    """Counts of tensors that are equal; ``CheckpointError`` names the first thing that is not.

    ``before`` are the source's param groups in the target's order; ``result`` was read from
    ``folder``, where the plan's files are.
    """
    retrace = Retrace(plan, folder)
    after = groups.read(result, trees.read(result.ranks[0].path).root)
    counts = {"parameters": 0, "states": 0, "others": 0, "copies": len(result.weights.copies)}
    if len(after) != len(before):
        raise _unlike(result, "number of param groups")
    for index, (group, made) in enumerate(zip(before, after, strict=True)):
        if list(group.shapes) != list(made.shapes) or group.keys != made.keys:
            raise _unlike(result, f"order of param group {index}")
        for what in ("options", "constants"):
            if not _equal(retrace, getattr(group, what), getattr(made, what)):
                raise _unlike(result, f"{what} of param group {index}")
        for key, values in group.values.items():
            for name, ref in values.items():
                _require(retrace, result, f"{key or 'fp32'} of {name}", ref, made.values[key][name])
            counts["states" if key else "parameters"] += len(values)
    held, found = source.weights, result.weights
    if (held.tensors.keys(), held.aliases, held.buffers) != (
        found.tensors.keys(),
        found.aliases,
        found.buffers,
    ):
        raise _unlike(result, "list of names")
    for name in found.tensors.keys() - {name for group in before for name in group.shapes}:
        _require(retrace, result, name, held.tensors[name], found.tensors[name])
        counts["others"] += 1
    for name, copy in found.copies.items():
        made_from = held.copies.get(name, held.tensors[name])
        _require(retrace, result, f"16-bit {name}", made_from, copy)
    return counts


def prove_rest(
    retrace: Retrace, one: Mapping[Any, Any], other: Mapping[Any, Any], but: set[str], path: Path
) -> None:
    """Raises unless two trees of ``path`` have the same under every key but those of ``but``."""
    for key in [*one, *(key for key in other if key not in one)]:
        if key not in but and not _equal(retrace, one.get(key), other.get(key)):
            raise CheckpointError(f"{path}: {key} is not what the source has; {_BUG}")


def read_back(plan: Plan, folder: Path, progress: Progress = lambda _: None) -> int:
    """Reads every storage of the plan's files, compares its CRC32, and returns the bytes."""
    total = 0
    for shard in plan.shards:
        right, _ = Ledger().check(torchzip.read(folder / shard.filename).checksums)
        progress(right)
        total += right
    return total


_BUG = "this is a fault of ckpt: please report it; the source is untouched"


def _unlike(result: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(f"{result.place.folder}: the {what} is not that of the source; {_BUG}")


def _require(
    retrace: Retrace, result: Checkpoint, what: str, expected: TensorRef, made: TensorRef
) -> None:
    """Raises unless a tensor of the result was made from the bytes of ``expected``."""
    if expected.shape != made.shape or _place(expected) != _where(retrace.source(made)):
        raise _unlike(result, what)


def _place(ref: TensorRef) -> Any:
    return _where(TensorRef.concat([ref]) if ref.numel else None)


def _where(ref: TensorRef | None) -> Any:
    return None if ref is None else (ref.dtype, tuple(ref.extents))


def _equal(retrace: Retrace, one: Any, other: Any) -> bool:
    """Whether two trees are the same values, their storages made from the same bytes."""

    def made_from(held: Storage, made: Storage) -> bool:
        return held.kind == made.kind and _place(held.ref) == _where(retrace.source(made.ref))

    return trees.equal(one, other, made_from)
