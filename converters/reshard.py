"""A checkpoint of ZeRO 1, 2 or 3 for another world size or stage, as a plan of DeepSpeed's files.

    zero, groups      every parameter, weights and state, whatever it is cut up for
    optimizer_trees   cut up for the target, and the objects that the optimizer files hold
    model_trees       the same for the model files
    zipplan           those objects as files, every byte decided

What does not depend on the topology (loss scaler, scheduler, client state, buffers) is written as
it was read, class by class. ``proof`` shows of a result that it holds every
element of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import (
    folder,
    groups,
    model_trees,
    muon,
    optimizer_trees,
    retrace,
    trees,
    zero,
    zipplan,
)
from converters.errors import CheckpointError, consistent
from converters.groups import Group
from converters.optimizer_trees import SCALING, SUB_GROUP, Target, scaled
from converters.plan import Plan
from converters.states import State
from converters.zero import Checkpoint

_FP32 = ("fp32", "float32", "float", "torch.float32")  # names of it, runtime/config.py: DtypeEnum
_LAYOUT = {  # what the layout decides, or a stage alone has, in an optimizer file
    "base_optimizer_state",
    "single_partition_of_fp32_groups",
    "group_paddings",
    "param_alignment_paddings",
    "partition_count",
    "param_slice_mappings",
    "optimizer_state_dict",
    "fp32_flat_groups",
    "base_optimizer_state_step",
    "clip_grad",
    "ds_version",
    "universal_checkpoint_info",
    "zero_stage",
}


def target(
    checkpoint: Checkpoint,
    stage: int | None,
    world_size: int,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
) -> Target:
    """What is asked for, with the settings that the run's own configuration gives.

    ``CheckpointError`` for a checkpoint that cannot be cut up anew.
    """
    _require(checkpoint)
    setting, module = checkpoint.model.setting, checkpoint.model.module
    stage = stage or checkpoint.stage or 1
    plain = stage == 1 and _bf16_optimizer(checkpoint.model)
    untrained = checkpoint.weights.buffers | checkpoint.weights.frozen
    trained = [module[name] for name in checkpoint.weights.tensors if name not in untrained]
    found = setting("zero_optimization", "sub_group_size")
    return Target(
        stage,
        world_size,
        setting("zero_optimization", "round_robin_gradients") is True and not plain,
        setting("zero_optimization", "parameter_alignment") is True and not plain,
        sub_group_size or (int(found) if isinstance(found, (int, float)) else SUB_GROUP),
        min((ref.dtype.itemsize for ref in trained), default=2),
        plain,
        muon.whole(checkpoint.model),
        zero_init,
    )


def bf16(model: State) -> bool:
    """Whether the run has bf16.enabled, which alone gives optimizer files their prefix."""
    return any(model.setting(name, "enabled") is True for name in ("bf16", "bfloat16"))


def _bf16_optimizer(model: State) -> bool:
    """Whether DeepSpeed makes a BF16_Optimizer of this configuration in stage 1.

    ``_do_optimizer_sanity_check`` in runtime/engine.py, DeepSpeed 0.19.8.
    """
    summed = model.setting("data_types", "grad_accum_dtype") in _FP32
    elastic = model.setting("zero_optimization", "elastic_checkpoint")
    return bf16(model) and summed and not muon.offloaded(model) and not elastic


def tag_folder(checkpoint: Checkpoint) -> str:
    """The name of the tag's folder, without those above it that a tag may name."""
    return Path(checkpoint.place.tag).name


def plan(checkpoint: Checkpoint, wanted: Target) -> Plan:
    """The files of the tag, named relative to the save_dir.

    Reads pickles; of tensors only Muon's momentum of matrices that ranks share (``muon``).
    ``CheckpointError`` for what cannot be cut up anew.
    """
    otherwise = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, otherwise):
        return _plan(checkpoint, wanted)


def _plan(checkpoint: Checkpoint, wanted: Target) -> Plan:
    ranks = [state.path for state in checkpoint.ranks]
    models = model_paths(checkpoint)
    found = _groups(checkpoint, wanted)
    _require_options(checkpoint, found, wanted)
    shards = []
    for rank, parts in enumerate(optimizer_trees.trees_of(found, wanted)):
        root = trees.read(ranks[rank % len(ranks)]).root
        optimizer = _optimizer(checkpoint, root, wanted, parts)
        tree = configured(root, wanted) | {"optimizer_state_dict": optimizer}
        shards.append(zipplan.shard(_optimizer_name(checkpoint, rank), tree))
    for rank, tree in enumerate(model_trees.trees_of(checkpoint, models, found, wanted)):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if wanted.stage == 3 else "mp_rank_00"
        name = f"{tag_folder(checkpoint)}/{name}_model_states.pt"
        shards.append(zipplan.shard(name, configured(tree, wanted)))
    return zipplan.plan(shards)


def prove(checkpoint: Checkpoint, wanted: Target, made: Plan, output: Path) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all that they hold with the source.

    By place, not by value (``retrace``); counts what was found equal. ``CheckpointError`` if
    anything is not.
    """
    result = zero.read(output / tag_folder(checkpoint))
    if (result.stage, result.world_size) != (wanted.stage, wanted.world_size):
        raise CheckpointError(f"{output} reads as stage {result.stage} of {result.world_size}")
    counts = retrace.prove(checkpoint, _groups(checkpoint, wanted), result, made, output)
    back = retrace.Retrace(made, output)
    decided = _LAYOUT | (set(SCALING) if wanted.bf16 else set())
    for rank, state in enumerate(result.ranks):
        one = trees.read(checkpoint.ranks[rank % checkpoint.world_size].path).root
        other = trees.read(state.path).root
        retrace.prove_rest(back, one, other, {"optimizer_state_dict", "ds_config"}, state.path)
        inner = scaled(one["optimizer_state_dict"]), scaled(other["optimizer_state_dict"])
        retrace.prove_rest(back, *inner, decided, state.path)
    paths = model_paths(checkpoint)
    for rank, path in enumerate(model_paths(result)):
        one, other = trees.read(paths[rank % len(paths)]).root, trees.read(path).root
        retrace.prove_rest(back, one, other, model_trees.DECIDED, path)
    return counts


def _groups(checkpoint: Checkpoint, wanted: Target) -> list[Group]:
    """The param groups, in the target's order."""
    found = groups.read(checkpoint, trees.read(checkpoint.ranks[0].path).root)
    return optimizer_trees.as_given(found, checkpoint, wanted)


def _require(checkpoint: Checkpoint) -> None:
    """Raises for what has no partitions to cut up anew, or not all that they should hold."""
    path, model = checkpoint.place.folder, checkpoint.model
    if not checkpoint.ranks:
        why = "was saved without ZeRO: it loads on any number of ranks as it is"
    elif model.setting("zero_optimization", "zenflow"):
        why = "was saved with ZenFlow, whose own state is in no file; it cannot be resharded"
    elif (count := model.root.get("dp_world_size")) != checkpoint.world_size:
        why = (
            f"was saved by {checkpoint.world_size} ranks, but says dp_world_size {count}: its "
            "topology is not known"
        )
    elif lost := [n for n in checkpoint.weights.absent if not n.endswith("_extra_state")]:
        why = f"lacks {lost[0]} ({checkpoint.weights.absent[lost[0]]}); it cannot be resharded"
    else:
        return
    raise CheckpointError(f"{path} {why}", "unsupported")


def _require_options(checkpoint: Checkpoint, found: Iterable[Group], wanted: Target) -> None:
    """Raises for an elastic checkpoint that is to become one of stage 3."""
    if wanted.stage == 3 and any(group.options is None for group in found):
        raise CheckpointError(
            f"{checkpoint.place.folder} was saved with elastic_checkpoint, which keeps no param "
            "groups, and stage 3 needs them; reshard it to stage 1 or 2",
            "unsupported",
        )


def _optimizer_name(checkpoint: Checkpoint, rank: int) -> str:
    """With the prefix that the run's files have: bf16_ or none."""
    prefix = "bf16_" if checkpoint.ranks[0].path.name.startswith("bf16_") else ""
    return f"{tag_folder(checkpoint)}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_paths(checkpoint: Checkpoint) -> list[Path]:
    if checkpoint.stage < 3:
        return [checkpoint.model.path]
    return list(folder.scan(checkpoint.place).partitioned.values())


def configured(root: Any, wanted: Target) -> dict[Any, Any]:
    """A root with stage and sub_group_size set in its configuration, as readers learn them."""
    config = root.get("ds_config")
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        return dict(root)
    settings = {**config["zero_optimization"], "stage": wanted.stage}
    if wanted.stage == 3 and settings.get("sub_group_size", SUB_GROUP) != wanted.sub_group_size:
        settings["sub_group_size"] = wanted.sub_group_size
    return {**root, "ds_config": {**config, "zero_optimization": settings}}


def _optimizer(
    checkpoint: Checkpoint, root: Mapping[Any, Any], wanted: Target, parts: Mapping[str, Any]
) -> dict[str, Any]:
    """The optimizer_state_dict of a rank, from that of a rank of the source.

    ``clip_grad``, which only stages 1 and 2 have, is left out where it is not known: the engine
    that loads has its own then.
    """
    held = root["optimizer_state_dict"]
    if wanted.bf16:
        others = {"param_alignment_paddings", "optimizer_state_dict", "fp32_flat_groups", *SCALING}
        kept = {key: value for key, value in held.items() if key not in others}
        return {"ds_version": root["ds_version"], **kept, **parts}
    held = scaled(held)
    made = optimizer_trees.stage_as(held["zero_stage"], wanted)
    if (wanted.stage == 3) == (checkpoint.stage == 3):
        return {**held, **parts, "zero_stage": made}
    kept = {key: value for key, value in held.items() if key not in _LAYOUT}
    version = {"ds_version": root["ds_version"]} if wanted.stage < 3 else {}
    return {**kept, **parts, "zero_stage": made, **version}
