"""The contents of DeepSpeed's files for a training that FSDP saved, as trees.

Keys and classes are those of DeepSpeed 0.19.8: ``_common_checkpoint_state`` of
``runtime/engine.py``, ``state_dict`` of ``runtime/zero/stage_1_and_2.py`` and
``stage3.py``. What FSDP does not save (client state, samples, a scheduler of DeepSpeed)
is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converters.dcp.native.training import FsdpTraining
from converters.pickles.values import Call
from converters.tensors import DType, Listed, TensorRef
from converters.torch_files import object_graph
from converters.torch_files.object_graph import Storage
from converters.zero import partitioning
from converters.zero.native import optimizer_files
from converters.zero.native.target import TargetTopology

VERSION = "0.19.8"  # of DeepSpeed, as which these files are laid out
_PRECISIONS = {DType.BF16: "bf16", DType.F16: "fp16"}


def configuration(target: TargetTopology, dtype: DType) -> dict[str, Any]:
    """The settings that the layout of the files was made for (``ds_config``)."""
    zero_optimization: dict[str, Any] = {"stage": target.stage}
    if target.stage == 3:
        zero_optimization["sub_group_size"] = target.sub_group_size
    config: dict[str, Any] = {"zero_optimization": zero_optimization}
    if dtype in _PRECISIONS:
        config[_PRECISIONS[dtype]] = {"enabled": True}
    return config


def optimizer_roots(
    training: FsdpTraining, target: TargetTopology, dtype: DType
) -> Iterator[dict[str, Any]]:
    """The roots of the optimizer files,
    in rank order; master weights and states in fp32."""
    stage = optimizer_files.stage_like(Call(optimizer_files.STAGE, (target.stage,)), target)
    for group_keys in optimizer_files.optimizer_trees(training.groups, target):
        values = optimizer_files.with_loss_scale(group_keys) | {"zero_stage": stage}
        if target.stage < 3:
            values |= {"ds_version": VERSION}  # without clip_grad the engine keeps its own
        yield {
            "optimizer_state_dict": in_fp32(values),
            "ds_config": configuration(target, dtype),
            "ds_version": VERSION,
        }


def in_fp32(node: Any) -> Any:
    """The same tree with storages of 16-bit numbers in fp32."""
    match node:
        case Storage():
            if not node.dtype.floating or node.dtype.itemsize >= 4:
                return node
            return object_graph.storage(node.ref, DType.F32)
        case Call():
            arguments = tuple(in_fp32(argument) for argument in node.args)
            pairs = [(key, in_fp32(value)) for key, value in node.pairs]
            return Call(node.of, arguments, node.state, node.items, pairs, node.new)
        case dict():
            return {key: in_fp32(value) for key, value in node.items()}
        case list():
            return [in_fp32(value) for value in node]

    return node


def model_roots(
    training: FsdpTraining, target: TargetTopology, dtype: DType
) -> Iterator[dict[str, Any]]:
    """The root of the model file of stages 1 and 2, or those of all ranks of stage 3."""
    common = _common(training, target, dtype)
    tensors = training.source.weights.tensors
    if target.stage < 3:
        nodes = {name: _whole(training, name, dtype) for name in tensors}
        fragments = {name: nodes[name] for name in training.frozen}
        yield {**_module(training, nodes), **common, **_frozen(training, target, fragments)}
        return

    buffers = training.source.weights.buffers
    for rank in range(target.world_size):
        nodes = {
            name: _whole(training, name, dtype) if name in buffers else _placeholder(dtype)
            for name in tensors
        }
        fragments = {}
        for name in training.frozen:
            piece = partitioning.partition_parameter(tensors[name], rank, target.world_size)
            fragments[name] = object_graph.tensor(object_graph.storage(piece), piece.shape)

        aliases = dict(training.source.weights.aliases) if rank == 0 else {}
        yield {
            **_module(training, nodes),
            **common,
            **_frozen(training, target, fragments),
            "shared_params": aliases,
        }


def _module(training: FsdpTraining, nodes: Mapping[str, Call]) -> dict[str, Any]:
    """The state dict, tied names with the tensor of their owner."""
    weights = training.source.weights
    names = dict.fromkeys((*weights.order, *weights.tensors))
    pairs = [
        (name, nodes[owner])
        for name in names
        if (owner := weights.aliases.get(name, name)) in nodes
    ]
    return {"module": object_graph.ordered(pairs)}


def _whole(training: FsdpTraining, name: str, dtype: DType) -> Call:
    """A tensor of the state dict: rounded to what is computed in, if it is trained."""
    tensor = training.source.weights.tensors[name]
    is_rounded = name in training.trained and tensor.dtype.floating
    storage = object_graph.storage(tensor.view(tensor.numel), dtype if is_rounded else None)
    return object_graph.tensor(storage, tensor.shape)


def _placeholder(dtype: DType) -> Call:
    """What stands for a partitioned parameter in the state dict of stage 3."""
    return object_graph.tensor(object_graph.storage(TensorRef(dtype, (0,), Listed())), (0,))


def _common(training: FsdpTraining, target: TargetTopology, dtype: DType) -> dict[str, Any]:
    """What all model files have alike."""
    return {
        "buffer_names": sorted(training.source.weights.buffers),
        "optimizer": None,
        "param_shapes": _param_shapes(training, target),
        "shared_params": dict(training.source.weights.aliases),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": training.step,
        "dp_world_size": target.world_size,
        "mp_world_size": 1,
        "ds_config": configuration(target, dtype),
        "ds_version": VERSION,
    }


def _param_shapes(training: FsdpTraining, target: TargetTopology) -> list[Call]:
    """The shapes of the trained parameters: a dict for each group,
    or sub-group of stage 3."""
    names_by_group: list[list[str]] = []
    for group in training.groups:
        if target.stage < 3:
            names_by_group.append(list(group.shapes))
            continue
        sub_groups = partitioning.sub_groups(group.shapes, target.world_size, target.sub_group_size)
        names_by_group += [list(names) for names in sub_groups]

    shapes = {name: shape for group in training.groups for name, shape in group.shapes.items()}
    return [
        object_graph.ordered((name, object_graph.size(shapes[name])) for name in names)
        for names in names_by_group
    ]


def _frozen(
    training: FsdpTraining, target: TargetTopology, fragments: Mapping[str, Call]
) -> dict[str, Any]:
    """The shapes of frozen parameters and what a rank has of them; stage 1 records none."""
    if target.stage == 1:
        return {"frozen_param_shapes": None, "frozen_param_fragments": None}
    tensors = training.source.weights.tensors
    return {
        "frozen_param_shapes": object_graph.ordered(
            (name, object_graph.size(tensors[name].shape)) for name in fragments
        ),
        "frozen_param_fragments": object_graph.ordered(fragments.items()),
    }
