"""A universal folder as a checkpoint that native files are made from.

    zero/NAME/*.pt               the param groups: whole parameters, and whole stacks of experts
    mp_rank_00_model_states.pt   everything that model files have beside
    zero/optimizer_state.pt      everything that optimizer files have beside

So it is written for other ranks as a merged checkpoint is (``merging``), by ``native``:
for any stage, and for tensor-parallel or expert ranks.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.source import SourceTopology
from converters.torch_files import object_graph
from converters.zero.checkpoint import Checkpoint
from converters.zero.experts import auto_ep
from converters.zero.files.state_files import State
from converters.zero.merging import experts, roots, whole_groups
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.expert_ranks import ExpertStates, RankGroups
from converters.zero.native import reshard
from converters.zero.native.optimizer_files import with_loss_scale
from converters.zero.param_groups import WEIGHTS, ParamGroup
from converters.zero.universal import same_weights
from converters.zero.universal.plan import LAYOUT, SHARDED, VERSION
from converters.zero.universal.reader import INFO, SUFFIX, Universal

_VERSION_KEY = "ds_version"


def checkpoint_of(source: Universal) -> MergedCheckpoint:
    """The checkpoint; reads pickles, and the first elements of weights.

    ``CheckpointError`` if the weights are not those that the model file has in 16 bits.
    """
    remedy = "a file is damaged or of another conversion; make it again"
    with consistent(source.checkpoint.place.folder, remedy):
        _require_module(source)
        same_weights.require(source.checkpoint)
        root = object_graph.read_root(source.models[0])
        entries = _optimizer_entries(source, root)
        if not source.layers:
            return replace(_dense(source, root), optimizer_entries=entries)

        checkpoint = _with_experts(source)
        dense = replace(checkpoint.dense, optimizer_entries=entries)
        return replace(checkpoint, dense=dense, optimizer_entries=entries)


def _require_module(source: Universal) -> None:
    """Raises for stages of a pipeline, whose layer files DeepSpeed does not copy."""
    if source.checkpoint.model.module:
        return
    raise CheckpointError(
        f"{source.checkpoint.place.folder} is of a pipeline, whose 16-bit weights lie in layer "
        "files that ds_to_universal.py does not copy; use ckpt reshard on the checkpoint that it "
        "was made from, or make the folder with ckpt to-universal",
        "unsupported",
    )


def _native_checkpoint(source: Universal) -> Checkpoint:
    """The checkpoint under the tag that the folder was made from, as its name tells."""
    checkpoint = source.checkpoint
    tag = reshard.tag_folder(checkpoint).removesuffix(SUFFIX) or "universal"
    return replace(checkpoint, place=replace(checkpoint.place, tag=tag))


def _as_saved(source: Universal, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the stage and the ranks of the run that saved."""
    ranks = checkpoint.world_size * source.model_ranks
    return replace(checkpoint, topology=SourceTopology(ranks, source.stage))


def _dense(source: Universal, root: Any) -> MergedCheckpoint:
    """The checkpoint of a model without experts, perhaps of tensor-parallel ranks."""
    checkpoint = _native_checkpoint(source)
    values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    values["model"] = State(checkpoint.model.file, roots.of_zero_alone(checkpoint.model.root))
    recorded = root.get(INFO)
    is_kept = recorded not in (None, VERSION) and source.model_ranks == 1
    return MergedCheckpoint(
        **values,
        source=_as_saved(source, checkpoint),
        groups=source.groups,
        model_paths=source.models[:1] if source.model_ranks > 1 else source.models,
        changes={INFO: recorded} if is_kept else {},
        cuts=source.cuts,
        tensor_ranks=source.tensor_ranks,
    )


def _with_experts(source: Universal) -> experts.ExpertsCheckpoint:
    """The checkpoint of a model of AutoEP."""
    checkpoint = _native_checkpoint(source)
    states = ExpertStates(
        checkpoint.place,
        tuple([checkpoint.model] * len(source.models)),
        checkpoint.ranks,
        source.layers,
        checkpoint.stage,
    )
    # of our own folders; those of DeepSpeed have the groups of the run that saved
    own_groups = whole_groups.of_one_rank(source.groups)
    groups = [_by_expert_rank(source, group) for group in own_groups or source.groups]
    merged = experts.of_groups(checkpoint, states, groups, {})
    limit = whole_groups.GROUP_NUMEL if own_groups is not None else merged.group_numel
    return replace(
        merged,
        group_numel=limit,
        source=_as_saved(source, checkpoint),
        model_paths=source.models,
        dense=replace(merged.dense, model_paths=source.models),
    )


def _by_expert_rank(source: Universal, group: ParamGroup) -> RankGroups:
    """A param group as the expert ranks of the run had it, where it is one of experts."""
    rank = source.checkpoint.ranks[0]
    if not whole_groups.is_expert_group(group):
        return RankGroups((group,), (rank,), has_experts=False)
    count = len(source.layers[0].experts)
    groups = tuple(_local_group(source, group, number) for number in range(count))
    return RankGroups(groups, (rank,) * count, has_experts=True)


def _local_group(source: Universal, group: ParamGroup, expert_rank: int) -> ParamGroup:
    """What an expert rank of the run had of a group of stacks."""
    model = source.checkpoint.model
    layers = {name: layer for layer in source.layers for name in layer.names}
    values = {
        key: {
            name: auto_ep.local_stack(model, layers[name], stack, expert_rank)
            for name, stack in tensors.items()
        }
        for key, tensors in group.values.items()
    }
    shapes = {name: values[WEIGHTS][name].shape for name in group.shapes}
    return replace(group, shapes=shapes, values=values)


def _optimizer_entries(source: Universal, root: Any) -> dict[str, Any]:
    """The root of an optimizer file, from ``optimizer_state.pt``.

    ``clip_grad`` and ``ds_version`` stand in files of stages 1 and 2 only.
    """
    common = with_loss_scale(source.common)
    kept_keys = common.keys() - SHARDED - LAYOUT | {"zero_stage"}
    state = {key: value for key, value in common.items() if key in kept_keys}
    version = state.pop(_VERSION_KEY, None) or root.get(_VERSION_KEY)
    if source.checkpoint.stage == 3:
        state.pop("clip_grad", None)
    else:
        state[_VERSION_KEY] = version

    return {
        "optimizer_state_dict": state,
        "ds_config": root.get("ds_config"),
        _VERSION_KEY: root.get(_VERSION_KEY),
    }
