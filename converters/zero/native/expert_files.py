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
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.plan import Plan, Shard
from converters.tensors import DType
from converters.torch_files import file_plan, object_graph
from converters.zero import partitioning
from converters.zero.experts.expert_files import NATIVE
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import expert_parts, roots, whole_groups
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import expert_entries, expert_trees, folding, model_files, reshard
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.target import TargetTopology

Tree = dict[Any, Any]
_SECTION, _SIZE = "expert_parallel", "autoep_size"  # of DeepSpeed's configuration


def plan(
    checkpoint: ExpertsCheckpoint,
    topology: TargetTopology,
    tensor_ranks: TensorRanks | None = None,
) -> Plan:
    """The files of the tag, named relative to the save_dir; reads pickles.

    With ``tensor_ranks`` those of tensor-parallel ranks. ``CheckpointError`` for what
    DeepSpeed does not load.
    """
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    parts = parts_of(checkpoint, topology, tensor_ranks)
    with consistent(checkpoint.place.folder, remedy):
        if not parts:
            ranks = ExpertRanks.of(checkpoint, topology, tensor_ranks)
            return file_plan.plan(_files(checkpoint, ranks, topology, 0))

        own_topology = of_part(topology)
        return file_plan.plan(
            [
                shard
                for rank, part in enumerate(parts)
                for shard in _files(
                    part, ExpertRanks.of(part, own_topology, None), own_topology, rank
                )
            ]
        )


def parts_of(
    checkpoint: ExpertsCheckpoint, topology: TargetTopology, tensor_ranks: TensorRanks | None
) -> list[ExpertsCheckpoint]:
    """What each model-parallel rank has, if each has a checkpoint of experts of its own:
    shards of all, or those of its stage. None where experts are dealt out to all ranks."""
    if topology.stages:
        stages = [stage.has_parameter for stage in topology.stages]
        return expert_parts.of_stages(checkpoint, stages)
    if tensor_ranks is not None and tensor_ranks.checkpoint is checkpoint:
        return expert_parts.of_tensor_ranks(checkpoint, tensor_ranks)
    return []


def of_part(topology: TargetTopology) -> TargetTopology:
    """The topology of the ranks of one part."""
    return replace(topology, tensor_ranks=1, stages=())


def _files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, model_rank: int
) -> list[Shard]:
    """The files of the model-parallel ranks from ``model_rank`` on."""
    shards = [
        *_optimizer_files(checkpoint, ranks, topology, model_rank),
        *_model_files(checkpoint, ranks, topology, model_rank),
    ]
    if topology.stage < 3:
        shards += _expert_files(checkpoint, ranks, model_rank)
    return shards


def _optimizer_files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, model_rank: int
) -> Iterator[Shard]:
    files = file_plan.AlikeFiles()
    for rank, group_keys in enumerate(expert_trees.trees(checkpoint, ranks, topology)):
        data_rank, lane = divmod(rank, len(ranks.lanes))
        root = merged.optimizer_root(ranks.lanes[lane], data_rank)
        source_state = reshard.optimizer_state(reshard.rank_path(checkpoint, data_rank), root)
        optimizer = reshard.optimizer_entries(checkpoint, root, source_state, topology, group_keys)
        tree = _configured(root, topology) | {"optimizer_state_dict": optimizer}
        tree |= folding.of_optimizer(checkpoint, ranks, topology, rank)
        name = reshard.optimizer_name(checkpoint, data_rank, model_rank + lane)
        yield files.shard(name, tree)


def _model_files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, model_rank: int
) -> Iterator[Shard]:
    for lane, dense in enumerate(ranks.lanes):
        paths = merged.model_paths(dense)
        trees = model_files.model_trees(dense, paths, dense.groups, topology)
        files = file_plan.AlikeFiles()
        for data_rank, tree in enumerate(trees):
            root = object_graph.read_root(paths[data_rank % len(paths)])
            rank = data_rank * len(ranks.lanes) + lane
            changes = _model_changes(checkpoint, ranks, topology, rank, root, tree)
            prefix = f"zero_pp_rank_{data_rank}_" if topology.stage == 3 else ""
            name = f"{prefix}mp_rank_{model_rank + lane:02d}_model_states.pt"
            whole_tree = _configured({**tree, **changes}, topology)
            yield files.shard(f"{reshard.tag_folder(checkpoint)}/{name}", whole_tree)


def _model_changes(
    checkpoint: ExpertsCheckpoint,
    ranks: ExpertRanks,
    topology: TargetTopology,
    rank: int,
    root: Mapping[Any, Any],
    tree: Tree,
) -> Tree:
    """The entries of the model file of a rank that tell of experts.

    ``root`` is that of a file of the source, ``tree`` the same without experts.
    """
    described_root = {**root, **({roots.INFO: tree[roots.INFO]} if len(ranks.lanes) > 1 else {})}
    changes: Tree = {
        "param_shapes": _param_shapes(checkpoint, ranks, topology, rank),
        **expert_entries.entries(checkpoint, described_root, ranks, topology, rank),
        **_local_names(checkpoint, ranks, topology, tree),
        **folding.of_model(checkpoint, ranks, rank, tree),
    }
    if checkpoint.stage == topology.stage == 3:  # AutoEP's second names of routers are not in it
        changes["shared_params"] = root.get("shared_params")
    return changes


def _param_shapes(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, rank: int
) -> list[Any]:
    """The shapes that a rank has of each group, under stage 3 of each sub-group."""
    shapes_by_group: list[Mapping[str, Shape]] = []
    for group in ranks.groups(checkpoint, rank):
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


def _expert_files(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, model_rank: int
) -> Iterator[Shard]:
    """The files of single experts: as they are, from the fp32 stacks of stage 3, or from
    parts of experts.

    Each tensor-parallel rank has a file of every expert that one of its ranks has.
    """
    folder = reshard.tag_folder(checkpoint)
    trees: Iterator[tuple[tuple[int, int], Tree]] = (
        (number, object_graph.read_root(path))
        for number, path in sorted(checkpoint.expert_paths.items())
    )
    if not checkpoint.expert_paths:
        trees = _trees_of_stacks(checkpoint) if checkpoint.layers else _trees_of_names(checkpoint)
    for (layer, expert), tree in trees:
        own_tree = roots.of_zero_alone(tree)
        for lane, entry in folding.of_expert(checkpoint, ranks, layer, expert):
            ending = f"mp_rank_{model_rank + lane:02d}_model_states.pt"
            name = f"layer_{layer}_expert_{expert}_{ending}"
            yield file_plan.shard(f"{folder}/{name}", own_tree | entry)


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


def _trees_of_names(checkpoint: ExpertsCheckpoint) -> Iterator[tuple[tuple[int, int], Tree]]:
    """The experts of DeepSpeed-MoE, whose tensors have names of their own."""
    weights = checkpoint.weights
    layers = {
        prefix: layer for layer, prefix in enumerate(whole_groups.expert_counts(weights.order))
    }
    trees: dict[tuple[int, int], Tree] = {}
    for name in weights.order:
        match = NATIVE.fullmatch(name)
        if match is None:
            continue
        owner = weights.aliases.get(name, name)
        tensor = weights.copies.get(owner, weights.tensors[owner])
        backing = object_graph.storage(tensor.view(tensor.numel))
        node = object_graph.tensor(backing, tensor.shape)
        trees.setdefault((layers[match["prefix"]], int(match["expert"])), {})[name] = node

    yield from trees.items()


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
