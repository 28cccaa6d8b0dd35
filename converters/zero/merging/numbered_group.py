"""The param group of a training in fp32 without ZeRO, whose states torch numbers.

The weights are those of the state dict. What ZeRO's optimizer files have beside the
group (loss scale, stage) is as ZeRO saves it in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.model_ranks import numbered_states
from converters.zero.parallel import lane_states
from converters.zero.param_groups import WEIGHTS, ParamGroup


def group_of(lane: Checkpoint) -> ParamGroup:
    """The only param group of a lane.

    ``CheckpointError`` where nothing shows which parameters the numbers are, or the
    optimizer is none of fp32.
    """
    optimizer = lane.model.root.get("optimizer")
    if not isinstance(optimizer, dict) or "param_groups" not in optimizer:
        raise CheckpointError(
            f"{lane.model.path} was saved without ZeRO in 16 bits, which is not written for other "
            "ranks; ckpt to-fp32 takes its weights",
            "unsupported",
        )
    states = lane_states.in_order(lane)
    if states is None:
        raise CheckpointError(
            f"{lane.model.path}: {numbered_states.UNKNOWN}; ckpt to-fp32 takes its weights",
            "unsupported",
        )

    return of_states(lane.model, lane.weights.tensors, states)


def of_states(
    model: State, weights: Mapping[str, TensorRef], states: Mapping[str, Mapping[Any, Any]]
) -> ParamGroup:
    """The only param group of a model file, by the states of its parameters in order.

    ``weights`` are by the same names. ``CheckpointError`` where the parameters have
    unlike numbers, as of steps.
    """
    values: dict[str, dict[str, TensorRef]] = {WEIGHTS: {name: weights[name] for name in states}}
    shapes = {name: tensor.shape for name, tensor in values[WEIGHTS].items()}
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, TensorRef) and value.shape == shapes[name] and key != "step":
                values.setdefault(key, {})[name] = value

    section = Section(model.path, "", object_graph.read_root(model.path))
    tree = section.section("optimizer")
    options = next(group for group in tree.dicts("param_groups") if group.get("params"))
    first_state = numbered_states.of_group(tree, options)[0]
    _require_alike(model, list(states.values()), values.keys())
    return ParamGroup(
        shapes,
        values,
        {key: node for key, node in first_state.items() if key not in values},
        {key: value for key, value in options.items() if key != "params"},
        tuple(first_state),
    )


def merged_lane(lane: Checkpoint) -> MergedCheckpoint:
    """The lane with its param group, as if ZeRO had said what is trained."""
    group = group_of(lane)
    values = {field.name: getattr(lane, field.name) for field in fields(Checkpoint)}
    values["weights"] = replace(lane.weights, frozen=lane.weights.frozen - group.shapes.keys())
    return MergedCheckpoint(**values, source=lane, groups=(group,), model_paths=(lane.model.path,))


def _require_alike(model: State, states: Sequence[Mapping[Any, Any]], kept_keys: Any) -> None:
    """Raises unless all parameters have the same numbers, as a group of ZeRO has them once."""
    numbers = [
        {key: numbered_states.number(value) for key, value in state.items() if key not in kept_keys}
        for state in states
    ]
    if any(values != numbers[0] for values in numbers):
        raise CheckpointError(
            f"{model.path}: its optimizer has other steps for some parameters of a param group "
            "than for others, which ZeRO keeps once",
            "unsupported",
        )


def ranks_of(model: State, world_size: int) -> tuple[State, ...]:
    """The optimizer files that ZeRO 1 would have written, without partitions."""
    root = {**model.root, "optimizer_state_dict": {"zero_stage": 1}}
    return (State(model.file, root),) * world_size


def optimizer_entries(model: State) -> dict[str, Any]:
    """The root of an optimizer file, as ZeRO writes it in fp32."""
    root = object_graph.read_root(model.path)
    version = root.get("ds_version")
    state = {"ds_version": version}
    return {
        "optimizer_state_dict": state,
        "ds_config": root.get("ds_config"),
        "ds_version": version,
    }
