"""The content of a model file on the parameters, for any stage and world size.

    stages 1, 2   mp_rank_00: the module in the type that is computed in, the trained parameters as
                  views into one storage a group, at the elements where the optimizer has them
    stage 3       one a rank: placeholders, and a piece of each frozen parameter

Source: ``_common_checkpoint_state`` of DeepSpeed 0.19.8 ``runtime/engine.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.pickles.values import Call
from converters.tensors import DType, Listed, TensorRef
from converters.torch_files import object_graph
from converters.zero import partitioning
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.typed import Section
from converters.zero.merging import checkpoint as merged
from converters.zero.native.optimizer_files import Tree
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import ParamGroup

DECIDED = {  # what the layout decides in a model file; its tensors are proven as weights
    "module",
    "param_shapes",
    "dp_world_size",
    "shared_params",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "ds_config",
}


def model_trees(
    checkpoint: Checkpoint,
    models: Sequence[Path],
    groups: Sequence[ParamGroup],
    target: TargetTopology,
) -> Iterator[Any]:
    """The root of each model file of the target.

    ``models`` are those of the source in rank order, each read when it is needed; rank
    r of stage 3 is made from that of rank r modulo their number, so that what only a
    rank knows (its buffers) is kept.
    """
    common = _common_keys(checkpoint, groups, target)
    if target.stage < 3:
        root = merged.model_root(checkpoint, models[0])
        changes = common | _module12(checkpoint, root, groups, target)
        yield object_graph.replaced(root, changes)
        return

    tensors = checkpoint.weights.tensors
    frozen_tensors = {name: tensors[name] for name in frozen_names(checkpoint)}
    for rank in range(target.world_size):
        root = merged.model_root(checkpoint, models[rank % len(models)])
        changes = dict(common)
        if checkpoint.stage < 3:
            changes["module"] = _placeholders(checkpoint, root)

        shared_params = root.get("shared_params") or _shared_params(checkpoint)
        changes["shared_params"] = shared_params if rank == 0 else {}

        fragments = []
        for name, tensor in frozen_tensors.items():
            piece = partitioning.partition_parameter(tensor, rank, target.world_size)
            node = object_graph.tensor(object_graph.storage(piece), piece.shape)
            fragments.append((name, node))

        changes |= _frozen_keys(checkpoint, fragments)
        yield object_graph.replaced(root, changes)


def _common_keys(
    checkpoint: Checkpoint, groups: Sequence[ParamGroup], target: TargetTopology
) -> Tree:
    """The values that are the same for all ranks:
    world size and order of the parameters.

    The parameters have their own names there.
    """
    own_names = checkpoint.names.parameters
    names_by_group: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}

    for group in groups:
        shapes |= group.shapes
        if target.stage < 3:
            names_by_group.append(target.order(group))
        else:
            sub_groups = partitioning.sub_groups(
                group.shapes, target.world_size, target.sub_group_size
            )
            names_by_group += [list(names) for names in sub_groups]

    param_shapes = [
        object_graph.ordered(
            (own_names.get(name, name), object_graph.size(shapes[name])) for name in names
        )
        for names in names_by_group
    ]
    return {"param_shapes": param_shapes, "dp_world_size": target.world_size}


def frozen_names(checkpoint: Checkpoint) -> list[str]:
    """The parameters without an optimizer, in the module's order.

    They are frozen, or without elements.
    """
    weights = checkpoint.weights
    return [name for name in weights.tensors if name in weights.frozen and not _extra(name)]


def _extra(name: str) -> bool:
    """Whether a name is of what nn.Module.get_extra_state returned, maybe a tensor."""
    return name.endswith("_extra_state")


def _frozen_keys(checkpoint: Checkpoint, fragments: Sequence[tuple[str, Call]]) -> Tree:
    """The frozen parameters' shapes and what a rank has of them.

    As stages 2 and 3 record them: ``None`` where the source says that they were left
    out, or knows of none.
    """
    # before 0.9.1 the key is not there; stage 1 has it, but no values
    root = checkpoint.model.root
    excluded = checkpoint.stage > 1 and root.get("frozen_param_shapes", ()) is None
    if excluded or (checkpoint.stage < 2 and not fragments):
        return {"frozen_param_shapes": None, "frozen_param_fragments": None}

    tensors, own_names = checkpoint.weights.tensors, checkpoint.names.parameters
    return {
        "frozen_param_shapes": object_graph.ordered(
            (own_names.get(name, name), object_graph.size(tensors[name].shape))
            for name, _ in fragments
        ),
        "frozen_param_fragments": object_graph.ordered(
            (own_names.get(name, name), node) for name, node in fragments
        ),
    }


def _shared_params(checkpoint: Checkpoint) -> dict[str, str]:
    """``shared_params``, by the parameters' own names."""
    own_names = checkpoint.names.parameters
    return {
        own_names.get(name, name): own_names.get(owner, owner)
        for name, owner in checkpoint.weights.aliases.items()
    }


def _module12(
    checkpoint: Checkpoint, model: Any, groups: Sequence[ParamGroup], target: TargetTopology
) -> Tree:
    """The module of stages 1 and 2, and the frozen parameters, which share storages."""
    weights = checkpoint.weights
    frozen = frozen_names(checkpoint)
    views = _views(checkpoint, groups, target)
    if checkpoint.stage == 3:  # whose module has placeholders for the frozen ones, too
        for name in frozen:
            tensor = weights.tensors[name]
            storage = object_graph.storage(tensor.view(tensor.numel))
            views[name] = object_graph.tensor(storage, tensor.shape)

    module = _module(checkpoint, model)
    nodes = {
        name: views.get(weights.aliases.get(name, name), node)
        for name, node in object_graph.pairs(module)
    }
    changes = {"module": object_graph.replaced(module, nodes)}
    if target.stage == 1:
        return changes | {"frozen_param_shapes": None, "frozen_param_fragments": None}

    fragments = [(name, node) for name in frozen if (node := nodes.get(name)) is not None]
    return changes | _frozen_keys(checkpoint, fragments)


def _module(checkpoint: Checkpoint, root: Mapping[Any, Any]) -> Any:
    """The state dict in a model file's root, as a tree."""
    return Section(checkpoint.model.path, "", root).required("module", object)


def _views(
    checkpoint: Checkpoint, groups: Sequence[ParamGroup], target: TargetTopology
) -> dict[str, Call]:
    """The trained parameters, as views into one storage for each group.

    Their values are those of the module or, where that is only placeholders, the master
    weights rounded.
    """
    model = checkpoint.model
    views: dict[str, Call] = {}

    for group in groups:
        names, paddings = target.order(group), target.paddings(group)
        tensors = [state_files.tensor(model, model.module[name], name) for name in names]
        dtype = tensors[0].dtype
        if checkpoint.stage == 3:
            tensors = [checkpoint.weights.tensors[name] for name in names]

        partitions = partitioning.partition_group(tensors, target.world_size, paddings)
        storage = object_graph.storage(TensorRef.concat(partitions), dtype)
        offset = 0
        for name, tensor, padding in zip(names, tensors, paddings, strict=True):
            views[name] = object_graph.tensor(storage, group.shapes[name], offset)
            offset += tensor.numel + padding

    return views


def _placeholders(checkpoint: Checkpoint, model: Any) -> Any:
    """The module of stage 3: buffers, and an empty storage for each parameter."""
    weights, module = checkpoint.weights, checkpoint.model.module
    module_tree = _module(checkpoint, model)
    placeholders: dict[str, Call] = {}
    nodes = {}

    for name, node in object_graph.pairs(module_tree):
        owner = weights.aliases.get(name, name)
        value = module[name]
        is_parameter = owner not in weights.buffers and not _extra(name)
        if not is_parameter or not isinstance(value, TensorRef):
            nodes[name] = node
            continue

        if owner not in placeholders:
            storage = object_graph.storage(_no_elements(value.dtype))
            placeholders[owner] = object_graph.tensor(storage, (0,))
        nodes[name] = placeholders[owner]

    return object_graph.replaced(module_tree, nodes)


def _no_elements(dtype: DType) -> TensorRef:
    return TensorRef(dtype, (0,), Listed())
