"""A checkpoint of ZeRO 1, 2 or 3 for another world size or stage,
as a plan of DeepSpeed's files.

    checkpoint, param_groups   every parameter, weights and state, whatever it is cut up for
    optimizer_files            cut up for the target, and the objects that optimizer files hold
    model_files                the same for the model files
    file_plan                  those objects as files, every byte decided

What does not depend on the topology (loss scaler, scheduler, client state, buffers) is
written as it was read, class by class. ``proof`` verifies that a result holds every
element of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from converters.errors import CheckpointError, consistent
from converters.plan import Plan, Shard
from converters.torch_files import file_plan, object_graph
from converters.zero import checkpoint as zero
from converters.zero import muon, param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.merging import checkpoint as merged
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.tensor_parallel import lanes_of
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import limits, model_files, optimizer_files, proof
from converters.zero.native.optimizer_files import (
    SCALING,
    with_loss_scale,
)
from converters.zero.native.target import SUB_GROUP, TargetTopology
from converters.zero.parallel import reader as parallel_reader
from converters.zero.param_groups import ParamGroup

AnyCheckpoint = TypeVar("AnyCheckpoint", bound=Checkpoint)
# the names of it in runtime/config.py: DtypeEnum
_FP32 = ("fp32", "float32", "float", "torch.float32")
LAYOUT = {  # what the layout decides, or a stage alone has, in an optimizer file
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
    "ds_zero_partition_groups",
}


def target(
    checkpoint: Checkpoint,
    stage: int | None,
    world_size: int,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
) -> TargetTopology:
    """The topology to make, with the settings that the run's own configuration gives.

    ``CheckpointError`` for a checkpoint that cannot be cut up for other ranks.
    """
    limits.require(checkpoint)
    setting, module = checkpoint.model.setting, checkpoint.model.module
    stage = checkpoint.stage or 1 if stage is None else stage

    # BF16_Optimizer neither deals parameters out nor aligns them
    bf16_optimizer = stage == 1 and _bf16_optimizer(checkpoint.model)
    round_robin = setting("zero_optimization", "round_robin_gradients") is True
    aligned = setting("zero_optimization", "parameter_alignment") is True

    itemsizes = [
        state_files.tensor(checkpoint.model, module[name], name).dtype.itemsize
        for name in limits.trained_names(checkpoint)
    ]

    return TargetTopology(
        stage,
        world_size,
        round_robin and not bf16_optimizer,
        aligned and not bf16_optimizer,
        sub_group_size or configured_sub_group_size(checkpoint.model),
        min(itemsizes, default=2),
        bf16_optimizer,
        muon.keeps_whole_momentum(checkpoint.model),
        zero_init,
    )


def configured_sub_group_size(model: State) -> int:
    """The elements of a sub-group of stage 3, as the run was configured."""
    configured_size = model.setting("zero_optimization", "sub_group_size")
    if not isinstance(configured_size, (int, float)):
        return SUB_GROUP
    if not 1 <= configured_size < state_files.MAX_ELEMENTS:
        raise model.fail(f"sub_group_size is {configured_size}, expected a number of elements")
    return int(configured_size)


def bf16(model: State) -> bool:
    """Whether the run has bf16.enabled, which gives optimizer files their prefix."""
    return any(model.setting(name, "enabled") is True for name in ("bf16", "bfloat16"))


def _bf16_optimizer(model: State) -> bool:
    """Whether DeepSpeed makes a BF16_Optimizer of this configuration in stage 1.

    ``_do_optimizer_sanity_check`` in runtime/engine.py, DeepSpeed 0.19.8.
    """
    sums_in_fp32 = model.setting("data_types", "grad_accum_dtype") in _FP32
    elastic = model.setting("zero_optimization", "elastic_checkpoint")
    return bf16(model) and sums_in_fp32 and not muon.offloaded(model) and not elastic


def tag_folder(checkpoint: Checkpoint) -> str:
    """The name of the tag's folder, without those above it that a tag may name."""
    return Path(checkpoint.place.tag).name


def plan(
    checkpoint: Checkpoint, topology: TargetTopology, tensor_ranks: TensorRanks | None = None
) -> Plan:
    """The files of the tag, named relative to the save_dir.

    With ``tensor_ranks`` those of tensor-parallel ranks, each on as many ranks as the
    topology has. Reads pickles; of tensors only Muon's momentum of matrices that ranks
    share (``muon``). ``CheckpointError`` for what cannot be cut up for other ranks.
    """
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        limits.require_rule(checkpoint, topology)
        return file_plan.plan(
            [
                shard
                for rank, rank_checkpoint in enumerate(by_tensor_rank(checkpoint, tensor_ranks))
                for shard in _shards(rank_checkpoint, topology, rank)
            ]
        )


def by_tensor_rank(
    checkpoint: AnyCheckpoint, tensor_ranks: TensorRanks | None
) -> Iterator[AnyCheckpoint | MergedCheckpoint]:
    """What the files of each tensor-parallel rank are made from;
    of one the checkpoint itself."""
    if tensor_ranks is None:
        yield checkpoint
        return
    yield from map(tensor_ranks.rank, range(tensor_ranks.rank_count))


def _shards(checkpoint: Checkpoint, topology: TargetTopology, model_rank: int) -> Iterator[Shard]:
    """The files of a model-parallel rank."""
    paths = merged.model_paths(checkpoint)
    groups = _groups(checkpoint, topology)
    limits.require_options(checkpoint, groups, topology)

    own_groups = param_groups.with_names(groups, checkpoint.names.parameters)
    files = file_plan.AlikeFiles()
    for rank, group_keys in enumerate(optimizer_files.optimizer_trees(own_groups, topology)):
        root = merged.optimizer_root(checkpoint, rank)
        source_state = optimizer_state(rank_path(checkpoint, rank), root)
        optimizer = optimizer_entries(checkpoint, root, source_state, topology, group_keys)
        tree = configured(root, topology) | {"optimizer_state_dict": optimizer}
        yield files.shard(optimizer_name(checkpoint, rank, model_rank), tree)

    files = file_plan.AlikeFiles()
    model_trees = model_files.model_trees(checkpoint, paths, groups, topology)
    for rank, tree in enumerate(model_trees):
        prefix = f"zero_pp_rank_{rank}_" if topology.stage == 3 else ""
        name = f"{prefix}mp_rank_{model_rank:02d}_model_states.pt"
        tree = configured(tree, topology)
        yield files.shard(f"{tag_folder(checkpoint)}/{name}", tree)


def prove(
    checkpoint: Checkpoint,
    topology: TargetTopology,
    native_plan: Plan,
    output: Path,
    tensor_ranks: TensorRanks | None = None,
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    folder = output / tag_folder(checkpoint)
    if tensor_ranks is None:
        return _prove(checkpoint, topology, native_plan, output, zero.read(folder))

    result = parallel_reader.read(folder, complete=True)
    if len(result.lanes) != tensor_ranks.rank_count:
        raise CheckpointError(f"{output} reads as {len(result.lanes)} tensor-parallel ranks")

    # the shards are those of these cuts, and the files say the same cuts: so they give
    # the whole model again
    proof.verify_cuts(result, tensor_ranks.layouts)
    counts = Counter[str]()
    for rank, lane in enumerate(lanes_of(result)):
        counts.update(_prove(tensor_ranks.rank(rank), topology, native_plan, output, lane, rank))
    return {key: count // len(result.lanes) for key, count in counts.items()}


def _prove(
    checkpoint: Checkpoint,
    topology: TargetTopology,
    native_plan: Plan,
    output: Path,
    result: Checkpoint,
    model_rank: int = 0,
) -> dict[str, int]:
    """Compares the files of one model-parallel rank."""
    if (result.stage, result.world_size) != (topology.stage, topology.world_size):
        raise CheckpointError(f"{output} reads as stage {result.stage} of {result.world_size}")

    groups = _groups(checkpoint, topology)
    counts = proof.verify_tensors(checkpoint, groups, result, native_plan, output)
    provenance = proof.Provenance(native_plan, output)
    decided_keys = LAYOUT | (set(SCALING) if topology.bf16 else set())

    verify_optimizer_files(provenance, checkpoint, result.ranks, decided_keys)
    model_paths = merged.model_paths(result, model_rank)
    verify_model_files(provenance, checkpoint, model_paths, model_files.DECIDED)

    return counts


def verify_optimizer_files(
    provenance: proof.Provenance,
    checkpoint: Checkpoint,
    states: Iterable[State],
    decided_keys: set[str],
    apart: Collection[str] = (),
) -> None:
    """Raises unless the optimizer files of all ranks have beside tensors what the
    source has.

    ``decided_keys`` of the optimizer's state may differ, and ``apart`` of the root.
    """
    ignored_keys = {"optimizer_state_dict", "ds_config", *apart}
    for rank, state in enumerate(states):
        source_root = merged.optimizer_root(checkpoint, rank)
        result_root = object_graph.read_root(state.path)
        proof.verify_metadata(provenance, source_root, result_root, ignored_keys, state.path)

        source_path = rank_path(checkpoint, rank)
        source_state = with_loss_scale(optimizer_state(source_path, source_root))
        result_state = with_loss_scale(optimizer_state(state.path, result_root))
        proof.verify_metadata(provenance, source_state, result_state, decided_keys, state.path)


def verify_model_files(
    provenance: proof.Provenance,
    checkpoint: Checkpoint,
    paths: Iterable[Path],
    decided_keys: set[str],
) -> None:
    """The same of the model files at ``paths``, in rank order."""
    source_paths = merged.model_paths(checkpoint)
    for rank, path in enumerate(paths):
        source_root = merged.model_root(checkpoint, source_paths[rank % len(source_paths)])
        result_root = object_graph.read_root(path)
        proof.verify_metadata(provenance, source_root, result_root, decided_keys, path)


def optimizer_state(path: Path, root: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tree of an optimizer file under ``optimizer_state_dict``."""
    return Section(path, "", root).required("optimizer_state_dict", dict)


def _groups(checkpoint: Checkpoint, topology: TargetTopology) -> list[ParamGroup]:
    """The param groups, in the target's order."""
    groups = merged.groups_of(checkpoint)
    return optimizer_files.in_optimizer_order(groups, checkpoint, topology)


def rank_path(checkpoint: Checkpoint, rank: int) -> Path:
    """The optimizer file that rank ``rank`` of any other number is made from."""
    return checkpoint.ranks[rank % len(checkpoint.ranks)].path


def optimizer_name(checkpoint: Checkpoint, rank: int, model_rank: int) -> str:
    """The name of a rank's optimizer file, with the run's prefix, bf16_ or none."""
    is_prefixed = checkpoint.ranks[0].path.name.startswith("bf16_")
    if merged.optimizer_entries_of(checkpoint) is not None:  # no such file tells it
        is_prefixed = bf16(checkpoint.model)
    prefix = "bf16_" if is_prefixed else ""
    name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{model_rank:02d}_optim_states.pt"
    return f"{tag_folder(checkpoint)}/{name}"


def configured(root: Any, topology: TargetTopology) -> dict[Any, Any]:
    """A root whose configuration has the stage and sub_group_size of the target.

    That is how readers learn them.
    """
    config = root.get("ds_config")
    source_settings = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(source_settings, dict):
        return dict(root)

    settings = {**source_settings, "stage": topology.stage}
    configured_size = settings.get("sub_group_size", SUB_GROUP)
    if topology.stage == 3 and configured_size != topology.sub_group_size:
        settings["sub_group_size"] = topology.sub_group_size

    return {**root, "ds_config": {**config, "zero_optimization": settings}}


def optimizer_entries(
    checkpoint: Checkpoint,
    root: Mapping[Any, Any],
    source_state: Mapping[Any, Any],
    topology: TargetTopology,
    group_keys: Mapping[str, Any],
) -> dict[str, Any]:
    """The optimizer_state_dict of a rank, from that of a rank of the source.

    ``clip_grad``, which only stages 1 and 2 have, is left out where it is not known:
    the engine that loads has its own then.
    """
    if topology.bf16:
        foreign_keys = {
            "param_alignment_paddings",
            "optimizer_state_dict",
            "fp32_flat_groups",
            *SCALING,
        }
        remaining = {key: value for key, value in source_state.items() if key not in foreign_keys}
        return {"ds_version": _version(checkpoint, root), **remaining, **group_keys}

    source_state = with_loss_scale(source_state)
    zero_stage = optimizer_files.stage_like(source_state["zero_stage"], topology)
    if (topology.stage == 3) == (checkpoint.stage == 3):
        return {**source_state, **group_keys, "zero_stage": zero_stage}

    # from stage 3 to another or back: nothing of the source's layout fits
    remaining = {key: value for key, value in source_state.items() if key not in LAYOUT}
    version = {"ds_version": _version(checkpoint, root)} if topology.stage < 3 else {}
    return {**remaining, **group_keys, "zero_stage": zero_stage, **version}


def _version(checkpoint: Checkpoint, root: Mapping[Any, Any]) -> object:
    """The version of DeepSpeed in the root of an optimizer file, which must have one."""
    return Section(checkpoint.ranks[0].path, "", root).required("ds_version", object)
