"""Optimizer state by the name of its parameter.

What an optimizer keeps for each element lies in its files exactly as the master weights do. So the
state of a parameter is found from its weights alone: each run of its bytes lies in some partition
of master weights, and the same elements of that partition's state are what is wanted. The names of
the state (``exp_avg``, ``momentum_buffer``, ...) come from the data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

from converters import muon, states
from converters.errors import CheckpointError
from converters.states import State
from converters.tensors import Extent, TensorRef
from converters.zero import Checkpoint

Value = TensorRef | int | float
Partition = tuple[Extent, int, Mapping[str, Any]]  # where masters lie, their itemsize, the state


def read(checkpoint: Checkpoint, name: str) -> dict[str, Value]:
    """The optimizer state of a parameter: tensors of its shape, and numbers such as ``step``.

    ``KeyError`` if the optimizer keeps nothing for the name; ``CheckpointError`` if what it keeps
    has no names (fp32 runs without ZeRO).
    """
    weights = checkpoint.weights
    ref = weights.tensors[weights.aliases.get(name, name)]
    found: dict[str, list[TensorRef]] = {}
    numbers: dict[str, Value] = {}
    by_path: dict[Any, list[Partition]] = {}
    for partition in sorted(_partitions(checkpoint), key=lambda p: p[0].offset):
        by_path.setdefault(partition[0].path, []).append(partition)
    for extent in ref.extents:
        near = by_path.get(extent.path, [])
        at = bisect_right(near, extent.offset, key=lambda p: p[0].offset) - 1
        if at < 0 or near[at][0].end < extent.end:
            raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")
        base, itemsize, state = near[at]
        start, count = (extent.offset - base.offset) // itemsize, extent.length // itemsize
        for key, value in state.items():
            if isinstance(value, TensorRef) and value.shape:
                if start + count <= value.numel:
                    found.setdefault(key, []).append(value.narrow(start, count))
            elif isinstance(number := states.scalar(value), (int, float)):
                numbers.setdefault(key, number)
    whole = {key: TensorRef.concat(parts) for key, parts in found.items()}
    shaped = {k: v.view(*ref.shape) for k, v in whole.items() if v.numel == ref.numel}
    return {**shaped, **numbers}


def _partitions(checkpoint: Checkpoint) -> Iterator[Partition]:
    """Every run of master weights with the optimizer's state for it."""
    for rank, state in enumerate(checkpoint.ranks):
        optimizer = state.optimizer
        kept = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
        if "fp32_flat_groups" in optimizer:
            yield from _stage3(checkpoint, state, kept)
        elif "local_sub_partitions_of_fp32_groups" in optimizer:
            for index, parts in enumerate(optimizer["local_sub_partitions_of_fp32_groups"]):
                yield from _paired(parts, kept[index] if isinstance(kept, list) else ())
        else:
            masters = optimizer["single_partition_of_fp32_groups"]
            yield from _paired(masters, _own(checkpoint, rank, masters, kept))
    if not checkpoint.ranks:
        yield from _without_zero(checkpoint.model)


def _paired(masters: Any, kept: Any) -> Iterator[Partition]:
    """Master tensors and their state, as far as both go; what is empty has none."""
    for master, state in zip(masters, kept, strict=False):
        if isinstance(master, TensorRef) and master.numel and isinstance(state, dict):
            yield master.extents[0], master.dtype.itemsize, state


def _ordered(kept: Any) -> list[Any]:
    """The state of each param group: a list (elastic), or a dict by the group's parameter id."""
    if isinstance(kept, list):
        return kept
    held = kept["state"]
    groups = kept.get("param_groups") or [{"params": [index]} for index in sorted(held)]
    return [held.get(index) for group in groups for index in group["params"]]


def _own(checkpoint: Checkpoint, rank: int, masters: Any, kept: Any) -> list[Any]:
    """The state of each param group, Muon's momentum for the elements of the rank alone."""
    found = _ordered(kept)
    options = kept.get("param_groups", ()) if isinstance(kept, dict) else ()
    shapes = states.shapes(checkpoint.model, "param_shapes") or []
    whole = muon.whole(checkpoint.model) and not checkpoint.bf16_optimizer
    for index, group in enumerate(options if whole else ()):
        buffer = (found[index] or {}).get(muon.MOMENTUM)
        if not muon.uses(group) or not isinstance(buffer, TensorRef):
            continue
        first = checkpoint.ranks[0].optimizer["single_partition_of_fp32_groups"][index].numel
        aligned = checkpoint.ranks[0].optimizer.get("param_alignment_paddings")
        paddings = aligned[index] if aligned else ()
        parts = muon.parts(shapes[index], rank * first, first, paddings)
        path, what = checkpoint.ranks[rank].path, "it is not known whose elements it has"
        muon.require_whole(path, f"group {index}", buffer, shapes[index], parts, what)
        own = muon.own(buffer, shapes[index], parts, masters[index].numel)
        found[index] = {**found[index], muon.MOMENTUM: own}
    return found


def _stage3(checkpoint: Checkpoint, state: State, kept: Any) -> Iterator[Partition]:
    flats = states.tensors(state, state.optimizer["fp32_flat_groups"], "fp32_flat_groups")
    ordered = [kept["state"].get(index) for index in range(len(flats))]
    yield from _paired(flats, ordered)
    rank = checkpoint.ranks.index(state)
    folder = checkpoint.place.folder / "offloaded_tensors" / f"rank{rank:02d}"
    for flat, held in zip(flats, ordered, strict=True):
        stem = flat.attributes.get("ds_id")
        path = folder / f"{stem}.tensor.swp"
        if flat.numel or not isinstance(held, dict) or not path.is_file():
            continue
        swapped = dict(held)
        for key, value in held.items():
            file = folder / f"{key}-{stem}.tensor.swp"
            if isinstance(value, TensorRef) and not value.numel and file.is_file():
                size = file.stat().st_size // value.dtype.itemsize
                run = Extent(file, 0, size * value.dtype.itemsize)
                swapped[key] = TensorRef(value.dtype, (size,), (run,))
        yield Extent(path, 0, path.stat().st_size), flat.dtype.itemsize, swapped


def _without_zero(model: State) -> Iterator[Partition]:
    optimizer = model.root.get("optimizer")
    kept = optimizer if isinstance(optimizer, dict) else {}
    masters = kept.get("fp32_groups_flat")
    if masters is None and "fp32_groups" in kept:
        masters = [master for group in kept["fp32_groups"] for master in group]
    if masters is None:
        raise CheckpointError(
            f"{model.path}: the optimizer's state of an fp32 run without ZeRO has no names",
            "unsupported",
        )
    yield from _paired(masters, _ordered(kept["optimizer_state_dict"]))
