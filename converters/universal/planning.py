"""Native checkpoint to universal folder and back, as plans of DeepSpeed's files.

    zero, groups  -->  zero/NAME/*.pt, optimizer_state.pt, both kinds of model file
    universal     -->  optimizer_trees, model_trees: native files, as ``reshard`` makes them

A stock engine of stage 1 or 2 reads ``mp_rank_00_model_states.pt`` of a universal folder, one of
stage 3 ``zero_pp_rank_0_mp_rank_00_model_states.pt``; ``ds_to_universal.py`` writes one of the two,
here both are written, so that every stage can load it. For the same reason ``optimizer_state.pt``
has the keys that either asks for. Sources: ``_get_all_ckpt_names`` (runtime/engine.py),
``load_hp_checkpoint_state_from_checkpoint_dir`` (runtime/base_optimizer.py) and its counterpart
in runtime/zero/stage3.py, DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters import (
    groups,
    model_trees,
    optimizer_trees,
    reshard,
    trees,
    views,
    zipplan,
)
from converters.errors import CheckpointError, consistent
from converters.groups import WEIGHTS, Group
from converters.optimizer_trees import SCALING, Target, scaled
from converters.plan import Plan
from converters.tensors import DType, TensorRef
from converters.universal import INFO, SUFFIX, Universal, folders
from converters.universal.folders import COMMON, MASTER, STEP
from converters.zero import Checkpoint

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
    """The files of the universal folder, named relative to the save_dir. Reads pickles only.

    ``CheckpointError`` for a checkpoint that is not cut up in partitions alone.
    """
    otherwise = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, otherwise):
        return _to_universal(checkpoint)


def from_universal(source: Universal, wanted: Target) -> Plan:
    """The native files, named relative to the save_dir. Reads pickles, and a little of weights.

    ``CheckpointError`` if the weights are not those that the model file has in 16 bits.
    """
    otherwise = "a file is damaged or of another conversion; make it again"
    with consistent(source.checkpoint.place.folder, otherwise):
        return _from_universal(source, wanted)


def universal_tag(checkpoint: Checkpoint) -> str:
    """The folder that a checkpoint's tag becomes."""
    return reshard.tag_folder(checkpoint) + SUFFIX


def native_tag(source: Universal) -> str:
    """The tag that a universal folder was made from, as its name tells."""
    return reshard.tag_folder(source.checkpoint).removesuffix(SUFFIX) or "universal"


def whole_of(checkpoint: Checkpoint) -> Target:
    """What the model file of stages 1 and 2 is made for; its order is that of the folder."""
    return reshard.target(checkpoint, min(checkpoint.stage or 1, 2), checkpoint.world_size)


def _to_universal(checkpoint: Checkpoint) -> Plan:
    whole = whole_of(checkpoint)  # also refuses what has no partitions
    parted = reshard.target(checkpoint, 3, 1)
    tree = trees.read(checkpoint.ranks[0].path).root
    found = optimizer_trees.as_given(groups.read(checkpoint, tree), checkpoint, whole)
    if any(group.options is None for group in found):
        raise CheckpointError(
            f"{checkpoint.place.folder} was saved with elastic_checkpoint, which keeps no param "
            "groups, and load_universal needs them; ckpt reshard makes native files of it",
            "unsupported",
        )
    shards = [
        zipplan.shard(f"{universal_tag(checkpoint)}/{name}", root)
        for name, root in _universal_files(checkpoint, tree, found, whole, parted)
    ]
    return zipplan.plan(shards)


def _universal_files(
    checkpoint: Checkpoint, tree: Any, found: Sequence[Group], whole: Target, parted: Target
) -> Iterator[tuple[str, Any]]:
    """The files of the tag by name, as trees."""
    models = reshard.model_paths(checkpoint)
    for name, target in (("mp_rank_00", whole), ("zero_pp_rank_0_mp_rank_00", parted)):
        root = next(iter(model_trees.trees_of(checkpoint, models, found, target)))
        informed = trees.replaced(root, {INFO: root.get(INFO) or dict(VERSION)})
        yield f"{name}_model_states.pt", informed
    yield f"zero/{COMMON}", common(tree, found)
    for name, stem, root in parameter_files(checkpoint, found):
        yield f"zero/{folders.folder_name(name)}/{stem}.pt", root


def common(tree: Any, found: Sequence[Group]) -> dict[Any, Any]:
    """``optimizer_state.pt`` for both loaders.

    Stages 1 and 2 take ``param_groups``, one by one. Stage 3 gives every param group what the first
    of the inner ones has, and every sub-group the step of the first; so the inner ones have only
    what all groups have alike, and the engine keeps its own of the rest.
    """
    held = scaled(tree["optimizer_state_dict"])
    made = {key: value for key, value in held.items() if key not in SHARDED}
    made.setdefault("ds_version", tree.get("ds_version"))
    options = [group.options or {} for group in found]
    alike = [k for k in options[0] if all(k in o and o[k] == options[0][k] for o in options)]
    made["param_groups"] = [{**held, "params": [i]} for i, held in enumerate(options)]
    made["optimizer_state_dict"] = {
        "state": {i: _kept(group) for i, group in enumerate(found)},
        "param_groups": [
            {**{key: held[key] for key in alike}, "params": [i]} for i, held in enumerate(options)
        ],
    }
    return made


def _kept(group: Group) -> dict[str, Any]:
    """The state of a group: what is kept once, and of what is kept for each element, where."""
    return {
        key: folders.elsewhere(key) if key in group.values else trees.copied(group.constants[key])
        for key in group.keys
    }


def parameter_files(
    checkpoint: Checkpoint, found: Sequence[Group]
) -> Iterator[tuple[str, str, Any]]:
    """Every file of a parameter: its name, the file's stem, the tree.

    Trained ones with their states; frozen ones, buffers and tied names with the weights alone, in
    fp32 where they are floating-point numbers (``ds_to_universal.py`` rounds integers to fp32, too,
    and tied names from 16 bits; here they have the master weights).
    """
    trained: dict[str, TensorRef] = {}
    for group in found:
        for key, held in group.values.items():
            for name, ref in held.items():
                yield name, _stem(key), _held(ref, ref.dtype)
        if STEP in group.constants:
            for name in group.shapes:
                yield name, STEP, trees.copied(group.constants[STEP])
        trained |= group.values[WEIGHTS]
    weights = checkpoint.weights
    for name, ref in weights.tensors.items():
        if name not in trained:
            yield name, MASTER, _held(ref, raised(ref))
    for name, owner in weights.aliases.items():
        ref = trained.get(owner, weights.tensors[owner])
        yield name, MASTER, _held(ref, ref.dtype if owner in trained else raised(ref))


def _stem(key: str) -> str:
    """The name of a state's files; ``CheckpointError`` for one that means something else there."""
    if key in (MASTER, STEP):
        raise CheckpointError(
            f"the optimizer keeps {key!r} for each element, which is something else in the "
            "universal format; use ckpt reshard",
            "unsupported",
        )
    return folders.folder_name(key) if key else MASTER


def raised(ref: TensorRef) -> DType:
    """The type that weights without an optimizer are written in."""
    return DType.F32 if ref.dtype.floating and ref.dtype.itemsize < 4 else ref.dtype


def _held(ref: TensorRef, dtype: DType) -> dict[str, Any]:
    """A tensor as the loaders want it (checkpoint/constants.py: CAT_DIM, PARAM)."""
    flat = ref if isinstance(ref.extents, tuple) else ref.view(ref.numel)
    return {"cat_dim": 0, "param": trees.tensor(trees.storage(flat, dtype), ref.shape)}


def _from_universal(source: Universal, wanted: Target) -> Plan:
    checkpoint = source.checkpoint
    _require_same_weights(checkpoint)
    model = trees.read(source.models[0]).root
    prefix = "bf16_" if reshard.bf16(checkpoint.model) else ""
    tag, shards = native_tag(source), []
    held = optimizer_trees.as_given(source.groups, checkpoint, wanted)
    for rank, parts in enumerate(optimizer_trees.trees_of(held, wanted)):
        tree = {
            "optimizer_state_dict": optimizer(source.common, model, wanted, parts),
            "ds_config": model.get("ds_config"),
            "ds_version": model.get("ds_version"),
        }
        name = f"{tag}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shards.append(zipplan.shard(name, reshard.configured(tree, wanted)))
    found = model_trees.trees_of(checkpoint, source.models, held, wanted)
    for rank, root in enumerate(found):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if wanted.stage == 3 else "mp_rank_00"
        kept = {key: value for key, value in root.items() if (key, value) != (INFO, VERSION)}
        tree = reshard.configured(kept, wanted)
        shards.append(zipplan.shard(f"{tag}/{name}_model_states.pt", tree))
    return zipplan.plan(shards)


def optimizer(
    held: Mapping[Any, Any], model: Mapping[Any, Any], wanted: Target, parts: Mapping[str, Any]
) -> dict[Any, Any]:
    """The ``optimizer_state_dict`` of a rank; ``held`` is ``optimizer_state.pt``.

    ``clip_grad`` and ``ds_version`` stand in files of stages 1 and 2 only.
    """
    held = scaled(held)
    made = optimizer_trees.stage_as(held["zero_stage"], wanted)
    kept = {key: value for key, value in held.items() if key not in SHARDED | LAYOUT}
    version = kept.pop("ds_version", None) or model.get("ds_version")
    if wanted.bf16:
        kept = {key: value for key, value in kept.items() if key not in SCALING}
        return {**kept, **parts, "ds_version": version}
    if wanted.stage == 3:
        kept.pop("clip_grad", None)
    else:
        kept["ds_version"] = version
    return {**kept, **parts, "zero_stage": made}


def _require_same_weights(checkpoint: Checkpoint) -> None:
    """Raises unless the master weights begin with what the model file has, rounded.

    ds_to_universal.py scrambles them, states included, under round_robin_gradients.
    """
    from converters import cast

    for name, copy in checkpoint.weights.copies.items():
        ref = checkpoint.weights.tensors[name]
        count = min(ref.numel, views.PROBE)
        if not cast.rounds_to(ref.narrow(0, count), copy.narrow(0, count)):
            shuffled = checkpoint.model.setting("zero_optimization", "round_robin_gradients")
            why = "ds_to_universal.py mixes them up under round_robin_gradients; "
            raise CheckpointError(
                f"{ref.extents[0].path} has other values of {name} than "
                f"{checkpoint.model.path.name}: {why if shuffled else ''}make the folder again "
                "with ckpt to-universal"
            )
