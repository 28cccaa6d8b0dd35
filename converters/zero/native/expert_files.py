"""A checkpoint of experts for other expert ranks,
world sizes and stages, as a plan of files.

    mp_rank_00_model_states.pt                    the model without experts
    layer_L_expert_E_mp_rank_00_model_states.pt   stages 1, 2: expert E of all, in 16 bits
    zero_pp_rank_R_mp_rank_00_optim_states.pt     a part of each param group (``expert_trees``)

Under stage 3 (AutoEP) each rank has a model file, and experts are in the optimizer files
alone. Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``_save_moe_checkpoint``,
``load_moe_state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.plan import Plan, Shard
from converters.tensors import DType
from converters.torch_files import file_plan, object_graph
from converters.words import numbers
from converters.zero import partitioning
from converters.zero.experts import auto_ep
from converters.zero.experts.expert_files import NATIVE
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import experts, roots, whole_groups
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native import expert_entries, expert_trees, model_files, proof, reshard
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.optimizer_files import with_loss_scale
from converters.zero.native.target import TargetTopology

Tree = dict[Any, Any]
_SECTION, _SIZE = "expert_parallel", "autoep_size"  # of DeepSpeed's configuration
# what the number of experts on a rank decides in a model file
_DECIDED = {*model_files.DECIDED, auto_ep.KEY, roots.INFO, "buffer_names"}


def plan(checkpoint: ExpertsCheckpoint, topology: TargetTopology) -> Plan:
    """The files of the tag, named relative to the save_dir; reads pickles.

    ``CheckpointError`` for what DeepSpeed does not load.
    """
    ranks = ExpertRanks.of(checkpoint, topology)
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        return file_plan.plan(
            [
                *_optimizer_files(checkpoint, ranks, topology),
                *_model_files(checkpoint, ranks, topology),
                *(_expert_files(checkpoint) if topology.stage < 3 else ()),
            ]
        )


def _optimizer_files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology
) -> Iterator[Shard]:
    for rank, group_keys in enumerate(expert_trees.trees(checkpoint, ranks, topology)):
        root = merged.optimizer_root(checkpoint, rank)
        source_state = reshard.optimizer_state(reshard.rank_path(checkpoint, rank), root)
        optimizer = reshard.optimizer_entries(checkpoint, root, source_state, topology, group_keys)
        tree = _configured(root, topology) | {"optimizer_state_dict": optimizer}
        yield file_plan.shard(reshard.optimizer_name(checkpoint, rank, 0), tree)


def _model_files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology
) -> Iterator[Shard]:
    paths = merged.model_paths(checkpoint)
    dense = checkpoint.dense
    trees = model_files.model_trees(dense, paths, dense.groups, topology)
    for rank, tree in enumerate(trees):
        root = object_graph.read_root(paths[rank % len(paths)])
        changes: Tree = {
            "param_shapes": _param_shapes(checkpoint, ranks, topology, rank),
            **expert_entries.entries(checkpoint, root, ranks, topology, rank),
            **_local_names(checkpoint, ranks, topology, tree),
        }
        if (
            checkpoint.stage == topology.stage == 3
        ):  # AutoEP's second names of routers are not in it
            changes["shared_params"] = root.get("shared_params")
        prefix = f"zero_pp_rank_{rank}_" if topology.stage == 3 else ""
        name = f"{reshard.tag_folder(checkpoint)}/{prefix}mp_rank_00_model_states.pt"
        yield file_plan.shard(name, _configured({**tree, **changes}, topology))


def _param_shapes(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, rank: int
) -> list[Any]:
    """The shapes that a rank has of each group, under stage 3 of each sub-group."""
    shapes_by_group: list[Mapping[str, Shape]] = []
    for group in ranks.groups(checkpoint, ranks.expert_rank(rank)):
        own_topology = replace(topology, world_size=len(ranks.seat(group, rank).team))
        if topology.stage == 3:
            shapes_by_group += partitioning.sub_groups(
                group.shapes, own_topology.world_size, topology.sub_group_size
            )
        else:
            names = own_topology.order(group)
            shapes_by_group.append({name: group.shapes[name] for name in names})

    return [
        object_graph.ordered((name, object_graph.size(shape)) for name, shape in shapes.items())
        for shapes in shapes_by_group
    ]


def _local_names(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, tree: Tree
) -> Tree:
    """What a model file says of buffers and frozen parameters of the first expert rank."""
    counts = whole_groups.expert_counts(checkpoint.weights.order)
    local_counts = {prefix: count // ranks.count for prefix, count in counts.items()}
    changes: Tree = {}
    buffer_names = tree.get("buffer_names")
    if isinstance(buffer_names, list):
        expert_names = [name for name in buffer_names if NATIVE.fullmatch(name)]
        changes["buffer_names"] = [
            *(name for name in buffer_names if name not in expert_names),
            *whole_groups.in_model_order(expert_names, local_counts, 1),
        ]

    own_experts = {
        name: checkpoint.weights.tensors[name] for name in _frozen_experts(checkpoint, local_counts)
    }
    is_excluded = checkpoint.stage > 1 and tree.get("frozen_param_fragments") is None
    if not own_experts or topology.stage == 1 or is_excluded:
        return changes

    shapes = tree.get("frozen_param_shapes") or object_graph.ordered(())
    fragments = tree.get("frozen_param_fragments") or object_graph.ordered(())
    own_shapes = {name: object_graph.size(ref.shape) for name, ref in own_experts.items()}
    own_fragments = {
        name: object_graph.tensor(object_graph.storage(ref.view(ref.numel)), ref.shape)
        for name, ref in own_experts.items()
    }
    changes["frozen_param_shapes"] = object_graph.replaced(shapes, own_shapes)
    changes["frozen_param_fragments"] = object_graph.replaced(fragments, own_fragments)
    return changes


def _frozen_experts(
    checkpoint: ExpertsCheckpoint, local_counts: Mapping[str, int]
) -> Iterator[str]:
    """The frozen parameters of the experts of the first expert rank,
    which have local names."""
    for name in checkpoint.weights.frozen:
        match = NATIVE.fullmatch(name)
        if match is not None and int(match["expert"]) < local_counts[match["prefix"]]:
            yield name


def _expert_files(checkpoint: ExpertsCheckpoint) -> Iterator[Shard]:
    """The files of single experts: as they are, or from the fp32 stacks of stage 3."""
    folder = reshard.tag_folder(checkpoint)
    trees: Iterator[tuple[tuple[int, int], Tree]] = (
        (number, object_graph.read_root(path))
        for number, path in sorted(checkpoint.expert_paths.items())
    )
    if not checkpoint.expert_paths:
        trees = _trees_of_stacks(checkpoint)
    for (layer, expert), tree in trees:
        name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
        yield file_plan.shard(f"{folder}/{name}", roots.of_zero_alone(tree))


def _trees_of_stacks(checkpoint: ExpertsCheckpoint) -> Iterator[tuple[tuple[int, int], Tree]]:
    dtype = _dtype(checkpoint)
    for number, layer in enumerate(checkpoint.layers):
        for expert in range(layer.count):
            tree: Tree = {}
            for name in layer.names:
                stack = checkpoint.weights.tensors[name]
                shape = stack.shape[1:]
                part = stack.narrow(expert * prod(shape), prod(shape))
                backing = object_graph.storage(part, dtype)
                tree[f"{name}.{expert}"] = object_graph.tensor(backing, shape)
            yield (number, expert), tree


def _dtype(checkpoint: ExpertsCheckpoint) -> DType:
    """The type that the model computes in, as the trained parameters of stage 3 have it."""
    model, dense = checkpoint.dense.model, checkpoint.dense
    names = [name for group in dense.groups for name in group.shapes]
    types = {state_files.tensor(model, model.module[name], name).dtype for name in names}
    if len(types) != 1:
        raise CheckpointError(
            f"{model.path} has parameters of {len(types)} types; the type of the experts, which "
            "are in fp32 alone, is not known",
            "unsupported",
        )
    return types.pop()


def _configured(root: Mapping[Any, Any], topology: TargetTopology) -> Tree:
    """A root whose configuration has the stage and the expert ranks of the target."""
    tree = reshard.configured(root, topology)
    config = tree.get(roots.CONFIGURATION)
    section = config.get(_SECTION) if isinstance(config, dict) else None
    if isinstance(config, dict) and isinstance(section, dict):
        own_section = {**section, _SIZE: topology.expert_ranks}
        tree[roots.CONFIGURATION] = {**config, _SECTION: own_section}
    return tree


def prove(
    checkpoint: ExpertsCheckpoint, topology: TargetTopology, native_plan: Plan, output: Path
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    ranks = ExpertRanks.of(checkpoint, topology)
    try:
        result = experts.read(output / reshard.tag_folder(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({output} is what was written; {proof.BUG})") from error
    topology_read = (result.stage, result.world_size, result.expert_sizes)
    if topology_read != (topology.stage, topology.world_size, (ranks.count,)):
        raise CheckpointError(
            f"{output} reads as stage {result.stage} of {result.world_size} ranks, whose experts "
            f"are dealt out to {numbers(result.expert_sizes)}; {proof.BUG}"
        )

    groups = [ranks.with_group_name(group) for group in checkpoint.groups]
    counts = proof.verify_tensors(checkpoint, groups, result, native_plan, output)
    provenance = proof.Provenance(native_plan, output)
    for rank, state in enumerate(result.ranks):
        source_root = merged.optimizer_root(checkpoint, rank)
        result_root = object_graph.read_root(state.path)
        apart = {"optimizer_state_dict", "ds_config"}
        proof.verify_metadata(provenance, source_root, result_root, apart, state.path)
        source_path = reshard.rank_path(checkpoint, rank)
        source_state = with_loss_scale(reshard.optimizer_state(source_path, source_root))
        result_state = with_loss_scale(reshard.optimizer_state(state.path, result_root))
        proof.verify_metadata(provenance, source_state, result_state, reshard.LAYOUT, state.path)

    source_paths = merged.model_paths(checkpoint)
    for rank, path in enumerate(merged.model_paths(result)):
        source_path = source_paths[rank % len(source_paths)]
        source_root = merged.model_root(checkpoint.dense, source_path)
        result_root = object_graph.read_root(path)
        proof.verify_metadata(provenance, source_root, result_root, _DECIDED, path)

    return counts
