"""Stages 1 and 2, and whatever else partitions flat groups: names and master weights.

Two independent maps lead from a name to its place in the flat groups: ``param_shapes``,
walked in order, and ``module``, whose trained tensors are views into one flat 16-bit
storage per group at the same element offsets. The walk is used where ``param_shapes``
is a list (DeepSpeed 0.5.4 and later), the views before that, and wherever both exist
they must agree. ``param_slice_mappings`` is never used: it is wrong under
round_robin_gradients.

What ``module`` holds beyond that is frozen, a buffer, or a second name of the
same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from converters import words
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero import partitioning
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.naming import storage_views, trained_storages
from converters.zero.naming.assemble import Parameters
from converters.zero.naming.group_storages import FlatGroup


def parameters(model: State, ranks: Sequence[State]) -> Parameters:
    """All parameters of a stage 1 or 2 checkpoint.

    ``CheckpointError`` if something disagrees.
    """
    groups = group_partitions(ranks)
    shapes = state_files.shapes(model, "param_shapes")
    shapes = shapes or state_files.shapes(ranks[0], "param_shapes")

    # before 0.5.4 only the views of module tell which parameter lies where
    if shapes is None or not state_files.listed(model, ranks[0]):
        flat_vectors = [partitioning.joined(group) for group in groups]
        masters = storage_views.by_view(model, flat_vectors)
        return storage_views.complete(model, masters, shapes)

    layouts = flat_groups(ranks[0], groups, shapes)
    if all(name in model.module for group in layouts for name in group.places):
        masters = {}
        for index, group in enumerate(layouts):
            _agree(model, index, group)
            masters |= group.masters()

        result = storage_views.complete(model, masters, shapes)
        trained_extents = trained_storages.holding(model, result.copies)
        # what is frozen lies elsewhere, unless a hook gave it that name
        if not trained_extents & trained_storages.holding(model, result.frozen):
            return result

    trained = trained_storages.trained(model, layouts)
    result = storage_views.complete(model, dict(trained.masters), shapes, trained.names)
    for name, reason in trained.absent.items():
        result.frozen.pop(name, None)
        result.aliases.pop(name, None)
        result.absent[name] = reason

    result.copies.update(trained.copies)
    result.notes.extend(trained.notes)
    return result


def group_partitions(ranks: Sequence[State]) -> list[list[TensorRef]]:
    """The flat fp32 vector of every group, as runs in order of their elements.

    ``ranks`` are the optimizer files in rank order; ``CheckpointError`` where they have
    unlike numbers of groups.
    """
    if "local_sub_partitions_of_fp32_groups" in ranks[0].optimizer:
        return _sub_partitions(ranks)

    key = "single_partition_of_fp32_groups"
    by_rank = [state_files.tensors(state, state.optimizer.get(key), key) for state in ranks]
    _require_equal_counts(ranks, by_rank, "parameter groups")
    return [list(group) for group in zip(*by_rank, strict=True)]


def _sub_partitions(ranks: Sequence[State]) -> list[list[TensorRef]]:
    """The flat fp32 vectors of stage 1 until 0.3.16,
    which dealt sub-partitions out in turns.

    Sub-partition c of rank r is run c * world_size + r of its group
    (``_retrieve_group_sub_partition_weights`` in v0.3.16 ``runtime/zero/stage1.py``).
    """
    key = "local_sub_partitions_of_fp32_groups"
    by_rank = [
        [
            state_files.tensors(state, group, key)
            for group in state.optimizer_fields.required(key, list)
        ]
        for state in ranks
    ]
    _require_equal_counts(ranks, by_rank, "parameter groups")
    groups = list(zip(*by_rank, strict=True))
    for group in groups:
        _require_equal_counts(ranks, group, "sub-partitions")

    return [[part for turn in zip(*group, strict=True) for part in turn] for group in groups]


def _require_equal_counts(
    ranks: Sequence[State], by_rank: Sequence[Sequence[object]], label: str
) -> None:
    """Raises unless all ranks have as many of something."""
    counts = {len(values) for values in by_rank}
    if len(counts) != 1:
        raise ranks[-1].fail(
            f"the ranks have unlike numbers of {label}, "
            f"{words.numbers(sorted(counts))}; saves are mixed"
        )


def flat_groups(
    state: State, groups: Sequence[Sequence[TensorRef]], shapes: Sequence[dict[str, Shape]]
) -> list[FlatGroup]:
    """Each group with the places of its parameters, by ``param_shapes`` in order.

    ``groups`` has the partitions of each, in rank order; ``state`` is an optimizer file.
    ``CheckpointError`` where the shapes do not fill the partitions.
    """
    if len(groups) != len(shapes):
        raise state.fail(f"{len(groups)} groups of weights, but param_shapes has {len(shapes)}")

    paddings = state_files.alignment_paddings(state, len(groups))
    return [
        flat_group(state, index, group, shapes[index], paddings[index])
        for index, group in enumerate(groups)
    ]


def flat_group(
    state: State,
    index: int,
    partitions: Sequence[TensorRef],
    shapes: dict[str, Shape],
    paddings: Sequence[int] = (),
) -> FlatGroup:
    """A group with the places of its parameters, from the partitions of all its ranks.

    ``paddings`` are the elements left empty behind each parameter, and ``state`` the
    optimizer file that has them. ``CheckpointError`` where the shapes do not fill the
    partitions.
    """
    if paddings and len(paddings) != len(shapes):
        raise state.fail(f"param_alignment_paddings[{index}] is not one for each parameter")

    unused_numel = partitioning.unused_elements(partitions, shapes, paddings)
    # every rank's run is aligned to two elements since 0.5.2, to one before
    if not 0 <= unused_numel < max(2 * len(partitions), 1):
        raise CheckpointError(
            f"{state.path.parent}: the ranks hold "
            f"{words.numbers(part.numel for part in partitions)} elements of group "
            f"{index}, its parameters take "
            f"{sum(prod(shape) for shape in shapes.values())}: one of the "
            "optimizer files is of another save"
        )

    places = dict(partitioning.places12(shapes, paddings))
    return FlatGroup(partitioning.joined(partitions), places)


def _agree(model: State, index: int, group: FlatGroup) -> None:
    """Raises if ``module`` and ``param_shapes`` place a parameter differently.

    Only where the group's parameters are views of one storage: clones say nothing.
    """
    tensors = {
        name: tensor
        for name in group.places
        if isinstance(tensor := model.module.get(name), TensorRef)
    }
    for name, tensor in tensors.items():
        expected_shape = group.places[name][1]
        if tensor.shape != expected_shape:
            raise model.fail(
                f"module has {name} as {words.shape(tensor.shape)}, param_shapes as "
                f"{words.shape(expected_shape)}"
            )

    positions = {
        name: position
        for name, tensor in tensors.items()
        if (position := storage_views.place(model, tensor))
    }
    if len({storage for storage, _ in positions.values()}) != 1 or len(positions) < 2:
        return

    for name, (offset, _) in group.places.items():
        if name in positions and positions[name][1] != offset:
            raise model.fail(
                f"{name} lies at element {positions[name][1]} of its group in module, "
                f"but at element {offset} of group {index} by param_shapes"
            )
