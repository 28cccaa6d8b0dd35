"""Native checkpoint to universal folder, as a plan of DeepSpeed's files.

    zero, groups  -->  zero/NAME/*.pt, optimizer_state.pt, both kinds of model file

A stock engine of stage 1 or 2 reads ``mp_rank_00_model_states.pt`` of a universal
folder, one of stage 3 ``zero_pp_rank_0_mp_rank_00_model_states.pt``;
``ds_to_universal.py`` writes one of the two, here both are written, so that every stage
can load it. For the same reason ``optimizer_state.pt`` has the keys that either asks
for. Sources: ``_get_all_ckpt_names`` (runtime/engine.py),
``load_hp_checkpoint_state_from_checkpoint_dir`` (runtime/base_optimizer.py) and its
counterpart in runtime/zero/stage3.py, DeepSpeed 0.19.8.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.plan import Plan
from converters.tensors import DType, TensorRef
from converters.torch_files import file_plan, object_graph
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.typed import Section
from converters.zero.merging import checkpoint as merged
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native import model_files, optimizer_files, reshard
from converters.zero.native.optimizer_files import with_loss_scale
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import WEIGHTS, ParamGroup
from converters.zero.universal import expert_models, parameter_folders
from converters.zero.universal.parameter_folders import COMMON, MASTER, STEP
from converters.zero.universal.reader import INFO, SUFFIX

VERSION = {"universal_checkpoint_version": 0.4}  # checkpoint/constants.py of DeepSpeed 0.19.8
SHARDED = {  # keys of an optimizer file that only a rank has
    "base_optimizer_state",
    "single_partition_of_fp32_groups",
    "param_slice_mappings",
    "fp32_flat_groups",
    "optimizer_state_dict",
}
LAYOUT = {  # further keys that the topology decides, or that a universal folder alone has
    "group_paddings",
    "param_alignment_paddings",
    "partition_count",
    "param_groups",
    "zero_stage",
    INFO,
}


def to_universal(checkpoint: Checkpoint) -> Plan:
    """The files of the universal folder, named relative to the save_dir.

    Reads pickles only. ``CheckpointError`` for a checkpoint that is not cut up in
    partitions alone.
    """
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        return _to_universal(checkpoint)


def universal_tag(checkpoint: Checkpoint) -> str:
    """The folder that a checkpoint's tag becomes."""
    return reshard.tag_folder(checkpoint) + SUFFIX


def stage12_target(checkpoint: Checkpoint) -> TargetTopology:
    """The target that the model file of stages 1 and 2 is made for.

    Its order is that of the folder.
    """
    stage = min(checkpoint.stage or 1, 2)
    return reshard.target(checkpoint, stage, checkpoint.world_size)


def _to_universal(checkpoint: Checkpoint) -> Plan:
    whole_target = stage12_target(checkpoint)  # also refuses what has no partitions
    stage_3_target = reshard.target(checkpoint, 3, 1)
    for name, state in checkpoint.names.state.items():
        raise CheckpointError(
            f"{checkpoint.place.folder}: the state dict calls the parameter {name} "
            f"{state}; the universal format has a folder for each name, and no place "
            "for another one; use ckpt reshard",
            "unsupported",
        )

    tree = merged.optimizer_root(checkpoint, 0)
    groups = groups_of(checkpoint)
    if any(group.options is None for group in groups):
        raise CheckpointError(
            f"{checkpoint.place.folder} was saved with elastic_checkpoint, which keeps "
            "no param groups, and load_universal needs them; ckpt reshard makes native "
            "files of it",
            "unsupported",
        )

    tag = universal_tag(checkpoint)
    files = _universal_files(checkpoint, tree, groups, whole_target, stage_3_target)
    return file_plan.plan([file_plan.shard(f"{tag}/{name}", root) for name, root in files])


def groups_of(checkpoint: Checkpoint) -> list[ParamGroup]:
    """The param groups of the folder, in the optimizer's order."""
    groups = merged.groups_of(checkpoint)
    if isinstance(checkpoint, ExpertsCheckpoint):
        expert_models.require_stacks(checkpoint)
        groups = expert_models.without_ranks(groups, checkpoint.group_numel)
    return optimizer_files.in_optimizer_order(groups, checkpoint, stage12_target(checkpoint))


def _universal_files(
    checkpoint: Checkpoint,
    tree: Any,
    groups: Sequence[ParamGroup],
    whole_target: TargetTopology,
    stage_3_target: TargetTopology,
) -> Iterator[tuple[str, Any]]:
    """The files of the tag by name, as trees."""
    models = merged.model_paths(checkpoint)
    targets = {"mp_rank_00": whole_target, "zero_pp_rank_0_mp_rank_00": stage_3_target}
    for name, target in targets.items():
        if isinstance(checkpoint, ExpertsCheckpoint):
            root = expert_models.model_root(checkpoint, models, groups, target)
        else:
            root = next(iter(model_files.model_trees(checkpoint, models, groups, target)))
        yield f"{name}_model_states.pt", object_graph.replaced(root, {INFO: info(root)})

    yield f"zero/{COMMON}", common(checkpoint, tree, groups)
    for name, stem, root in parameter_files(checkpoint, groups):
        yield f"zero/{parameter_folders.folder_name(name)}/{stem}.pt", root


def info(root: Mapping[Any, Any]) -> Any:
    """The entry of a model file on the universal format, or ours where it has none.

    DeepSpeed's own tests save an empty one; ``load_universal`` wants a version in it.
    """
    return root.get(INFO) or dict(VERSION)


def common(checkpoint: Checkpoint, tree: Any, groups: Sequence[ParamGroup]) -> dict[Any, Any]:
    """``optimizer_state.pt`` for both loaders.

    Stages 1 and 2 take ``param_groups``, one by one. Stage 3 gives every param
    group what the first of the inner ones has, and every sub-group the step of
    the first; so the inner ones have only what all groups have alike, and the
    engine keeps its own of the rest.
    """
    path = checkpoint.ranks[0].path
    optimizer_state = with_loss_scale(
        Section(path, "", tree).required("optimizer_state_dict", dict)
    )
    common_state = {key: value for key, value in optimizer_state.items() if key not in SHARDED}
    common_state.setdefault("ds_version", tree.get("ds_version"))

    options = [group.options or {} for group in groups]
    common_keys = [
        key
        for key in options[0]
        if all(
            key in group_options
            and object_graph.equal(group_options[key], options[0][key], operator.is_)
            for group_options in options
        )
    ]

    common_state["param_groups"] = [
        {**group_options, "params": [index]} for index, group_options in enumerate(options)
    ]
    common_state["optimizer_state_dict"] = {
        "state": {index: _group_state(group) for index, group in enumerate(groups)},
        "param_groups": [
            {**{key: group_options[key] for key in common_keys}, "params": [index]}
            for index, group_options in enumerate(options)
        ],
    }

    return common_state


def _group_state(group: ParamGroup) -> dict[str, Any]:
    """The state of a group: what is kept once, and where the rest is kept."""
    return {
        key: parameter_folders.elsewhere(key)
        if key in group.values
        else object_graph.copied(group.constants[key])
        for key in group.keys
    }


def parameter_files(
    checkpoint: Checkpoint, groups: Sequence[ParamGroup]
) -> Iterator[tuple[str, str, Any]]:
    """Every file of a parameter: its name, the file's stem, the tree.

    Trained ones with their states; frozen ones, buffers and tied names with the
    weights alone, in fp32 where they are floating-point numbers
    (``ds_to_universal.py`` rounds integers to fp32, too, and tied names from 16
    bits; here they have the master weights).
    """
    trained: dict[str, TensorRef] = {}
    for group in groups:
        for key, tensors in group.values.items():
            for name, tensor in tensors.items():
                entries = merged.universal_entries(checkpoint, name)
                yield name, _stem(key), {**_tensor_entry(tensor, tensor.dtype), **entries}

        if STEP in group.constants:
            for name in group.shapes:
                yield name, STEP, object_graph.copied(group.constants[STEP])

        trained |= group.values[WEIGHTS]

    weights = checkpoint.weights
    for name, tensor in weights.tensors.items():
        if name not in trained:
            yield name, MASTER, _tensor_entry(tensor, raised(tensor))

    for name, owner in weights.aliases.items():
        tensor = trained.get(owner, weights.tensors[owner])
        dtype = tensor.dtype if owner in trained else raised(tensor)
        yield name, MASTER, _tensor_entry(tensor, dtype)


def _stem(key: str) -> str:
    """The name of a state's files.

    ``CheckpointError`` for one that means something else there.
    """
    if key in (MASTER, STEP):
        raise CheckpointError(
            f"the optimizer keeps {key!r} for each element, which is something else in "
            "the universal format; use ckpt reshard",
            "unsupported",
        )

    return parameter_folders.folder_name(key) if key else MASTER


def raised(tensor: TensorRef) -> DType:
    """The type that weights without an optimizer are written in."""
    dtype = tensor.dtype
    return DType.F32 if dtype.floating and dtype.itemsize < 4 else dtype


def _tensor_entry(tensor: TensorRef, dtype: DType) -> dict[str, Any]:
    """A tensor as the loaders want it (checkpoint/constants.py: CAT_DIM, PARAM)."""
    flattened = tensor.view(tensor.numel) if tensor.extents.scattered else tensor
    storage = object_graph.storage(flattened, dtype)
    return {"cat_dim": 0, "param": object_graph.tensor(storage, tensor.shape)}
