"""Param groups as the optimizer has them: what a topology is made from, and what
it is made of.

Every parameter's master weights and every per-element state of it, located, whatever
stage and world size they are cut up for. What an optimizer keeps for each element lies
in its files exactly as the master weights do (``layout``); the names of the state come
from the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from converters import words
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero import partitioning
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.rank_vectors import WEIGHTS as WEIGHTS
from converters.zero.rank_vectors import RankFiles, SubGroupFiles, states_and_options

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """A param group.

    ``shapes`` are in the order in which the optimizer was given the parameters.
    ``values`` has the master weights, under ``WEIGHTS``, and each state by name and
    parameter; ``constants`` what is kept once (``step``), and ``options`` the learning
    rate and so on (``None`` in an elastic checkpoint, which has none), both as trees.
    ``keys`` is the order of the states.
    """

    shapes: Mapping[str, Shape]
    values: Mapping[str, Mapping[str, TensorRef]]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] | None
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        for key, tensors_by_name in self.values.items():
            mismatched = [
                name
                for name, shape in self.shapes.items()
                if tensors_by_name[name].shape != tuple(shape)
            ]

            if mismatched or tensors_by_name.keys() != self.shapes.keys():
                raise ValueError(
                    f"{key or 'weights'} are not those of the parameters: "
                    f"{words.some(mismatched) or 'the names are others'}"
                )


def read(checkpoint: Checkpoint, tree: Any) -> list[ParamGroup]:
    """The groups of a checkpoint; ``tree`` is rank 0's optimizer file (``trees.read``).

    ``CheckpointError`` if something is kept that is neither per element nor a constant.
    """
    path = checkpoint.ranks[0].path
    optimizer = Section(path, "", tree).section("optimizer_state_dict")
    if checkpoint.stage == 3:
        return list(_stage3(checkpoint, optimizer))
    return list(_stage12(checkpoint, optimizer))


def _stage12(checkpoint: Checkpoint, optimizer: Section) -> Iterator[ParamGroup]:
    shapes = _shapes(checkpoint)
    files = RankFiles.of(checkpoint, len(shapes))
    # a tree of rank 0's file, whose groups ``files`` has counted
    constant_states, group_options = states_and_options(optimizer)

    # BF16_Optimizer deals no parameters out
    round_robin = checkpoint.model.setting("zero_optimization", "round_robin_gradients") is True
    round_robin = round_robin and not checkpoint.bf16_optimizer

    for index, group_shapes in enumerate(shapes):
        options = group_options[index] if group_options else None
        vectors = files.vectors(index, group_shapes, options)
        values = {
            key: dict(partitioning.stage12(partitions, group_shapes, files.paddings[index]))
            for key, partitions in vectors.items()
        }

        names = list(group_shapes)
        if round_robin:
            names = partitioning.undo_round_robin(names, len(checkpoint.ranks))

        state = constant_states[index]
        yield ParamGroup(
            {name: group_shapes[name] for name in names},
            values,
            {key: value for key, value in state.items() if key not in vectors},
            None if options is None else _without_params(options),
            tuple(state),
        )


def _stage3(checkpoint: Checkpoint, optimizer: Section) -> Iterator[ParamGroup]:
    shapes = _shapes(checkpoint)
    inner = optimizer.section("optimizer_state_dict")
    nodes = inner.section("state")
    group_options = inner.dicts("param_groups")
    indices_by_group = _sub_group_indices(checkpoint.ranks[0], group_options, len(shapes))
    files = SubGroupFiles.of(checkpoint)

    for options, indices in zip(group_options, indices_by_group, strict=True):
        group_shapes: dict[str, Shape] = {}
        values: dict[str, dict[str, TensorRef]] = {}

        for index in indices:
            group_shapes |= shapes[index]
            sub_group_vectors = files.vectors(index, indices[0], shapes[index])
            if values and sub_group_vectors.keys() != values.keys():
                raise checkpoint.ranks[0].fail(
                    f"sub-group {index} has other state of its elements than sub-group "
                    f"{indices[0]} of the same param group"
                )

            for key, vectors in sub_group_vectors.items():
                tensors_by_name = partitioning.stage3(vectors, shapes[index])
                values.setdefault(key, {}).update(tensors_by_name)

        if group_shapes:
            first_node = nodes.state(indices[0])
            constants = {key: value for key, value in first_node.items() if key not in values}
            yield ParamGroup(
                group_shapes, values, constants, _without_params(options), tuple(first_node)
            )


def _sub_group_indices(
    rank: State, group_options: Sequence[dict[str, Any]], sub_group_count: int
) -> list[list[int]]:
    """The sub-groups of each param group;
    ``CheckpointError`` unless they are all, in order."""
    indices_by_group = [
        Section(rank.path, "param_groups", group).numbers("params") for group in group_options
    ]
    all_indices = [index for group in indices_by_group for index in group]
    if all_indices != list(range(sub_group_count)):
        text = "; ".join(map(words.numbers, indices_by_group))
        raise rank.fail(
            f"its param groups hold the sub-groups {text}, expected all {sub_group_count} in order"
        )
    return indices_by_group


def _without_params(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "params"}


def _shapes(checkpoint: Checkpoint) -> list[dict[str, Shape]]:
    """``param_shapes``, with the names that the state dict has for the parameters."""
    model, names = checkpoint.model, checkpoint.names
    groups = state_files.shapes(model, "param_shapes")
    if groups is None or not isinstance(model.root.get("param_shapes"), list):
        raise CheckpointError(
            f"{model.path} was saved by DeepSpeed {model.version or 'before 0.4.2'}, "
            "which records no param_shapes by group here; resharding needs 0.6.0 or "
            "later",
            "unsupported",
        )

    if not groups:
        raise model.fail("its param_shapes name no parameter: nothing is trained")
    if not names.state:
        return groups
    return [
        {names.state.get(name, name): shape for name, shape in group.items()} for group in groups
    ]


def with_names(groups: Sequence[ParamGroup], names: Mapping[str, str]) -> list[ParamGroup]:
    """The groups with other names of the parameters; ``names`` maps old to new."""
    if not names:
        return list(groups)

    def renamed(by_name: Mapping[str, _Value]) -> dict[str, _Value]:
        return {names.get(name, name): value for name, value in by_name.items()}

    return [
        replace(
            group,
            shapes=renamed(group.shapes),
            values={key: renamed(tensors) for key, tensors in group.values.items()},
        )
        for group in groups
    ]
