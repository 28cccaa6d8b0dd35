"""Stages 1 and 2, and whatever else partitions flat groups: names and master weights.

Two independent maps lead from a name to its place in the flat groups: ``param_shapes``, walked in
order, and ``module``, whose trained tensors are views into one flat 16-bit storage per group at the
same element offsets. The walk is used where ``param_shapes`` is a list (DeepSpeed 0.5.4 and later),
the views before that, and wherever both exist they must agree. ``param_slice_mappings`` is never
used: it is wrong under round_robin_gradients.

What ``module`` holds beyond that is frozen, a buffer, or a second name of the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from converters import layout, states, views
from converters.errors import CheckpointError
from converters.parameters import Parameters
from converters.states import Shape, State
from converters.tensors import TensorRef


def parameters(model: State, ranks: Sequence[State]) -> Parameters:
    """All parameters of a stage 1 or 2 checkpoint; ``CheckpointError`` if something disagrees."""
    groups = _partitions(ranks)
    shapes = states.shapes(model, "param_shapes") or states.shapes(ranks[0], "param_shapes")
    if shapes is not None and states.listed(model, ranks[0]):
        masters = _walk(model, ranks[0], groups, shapes)
    else:
        masters = views.by_view(model, [TensorRef.concat(group) for group in groups])
    return views.complete(model, masters, shapes)


def _partitions(ranks: Sequence[State]) -> list[list[TensorRef]]:
    """The flat fp32 vector of every group, as runs in order of their elements."""
    if "local_sub_partitions_of_fp32_groups" in ranks[0].optimizer:
        return _sub_partitions(ranks)
    key = "single_partition_of_fp32_groups"
    by_rank = [states.tensors(state, state.optimizer.get(key), key) for state in ranks]
    counts = {len(groups) for groups in by_rank}
    if len(counts) != 1:
        raise ranks[-1].fail(f"the ranks have {sorted(counts)} parameter groups; saves are mixed")
    return [list(group) for group in zip(*by_rank, strict=True)]


def _sub_partitions(ranks: Sequence[State]) -> list[list[TensorRef]]:
    """The same for stage 1 until 0.3.16, which dealt sub-partitions out in turns.

    Sub-partition c of rank r is run c * world_size + r of its group
    (``_retrieve_group_sub_partition_weights`` in v0.3.16 ``runtime/zero/stage1.py``).
    """
    key = "local_sub_partitions_of_fp32_groups"
    by_rank = [
        [states.tensors(state, group, key) for group in state.optimizer[key]] for state in ranks
    ]
    return [
        [part for turn in zip(*group, strict=True) for part in turn]
        for group in zip(*by_rank, strict=True)
    ]


def _walk(
    model: State, state: State, groups: list[list[TensorRef]], shapes: list[dict[str, Shape]]
) -> dict[str, TensorRef]:
    """Name to master weight, by ``param_shapes`` in order."""
    if len(groups) != len(shapes):
        raise state.fail(f"{len(groups)} groups of weights, but param_shapes has {len(shapes)}")
    aligned = state.optimizer.get("param_alignment_paddings") or [()] * len(groups)
    masters: dict[str, TensorRef] = {}
    for index, (group, named) in enumerate(zip(groups, shapes, strict=True)):
        paddings = aligned[index] if any(aligned[index]) else ()
        if paddings and len(paddings) != len(named):
            raise state.fail(f"param_alignment_paddings[{index}] is not one for each parameter")
        left = layout.leftover12(group, named, paddings)
        # every rank's run is aligned to two elements since 0.5.2, to one before
        if not 0 <= left < max(2 * len(group), 1):
            raise CheckpointError(
                f"{state.path.parent}: the ranks hold {[part.numel for part in group]} elements of "
                f"group {index}, its parameters take {sum(prod(n) for n in named.values())}: one "
                "of the optimizer files is of another save"
            )
        masters |= dict(layout.stage12(group, named, paddings))
        _agree(model, index, named, paddings)
    return masters


def _agree(model: State, index: int, shapes: dict[str, Shape], paddings: Sequence[int]) -> None:
    """Raises if the views of ``module`` place a parameter elsewhere than ``param_shapes`` does.

    Only where the group's parameters are views of one storage: clones say nothing.
    """
    module = model.module
    held = {name: ref for name in shapes if isinstance(ref := module.get(name), TensorRef)}
    for name, ref in held.items():
        if ref.shape != shapes[name]:
            raise model.fail(
                f"module has {name} as {list(ref.shape)}, param_shapes as {list(shapes[name])}"
            )
    seen = {name: place for name, ref in held.items() if (place := views.place(model, ref))}
    if len({storage for storage, _ in seen.values()}) != 1 or len(seen) < 2:
        return
    at = 0
    for position, (name, shape) in enumerate(shapes.items()):
        if name in seen and seen[name][1] != at:
            raise model.fail(
                f"{name} lies at element {seen[name][1]} of its group in module, but at element "
                f"{at} of group {index} by param_shapes"
            )
        at += prod(shape) + (paddings[position] if paddings else 0)
