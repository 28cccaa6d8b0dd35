"""A checkpoint for another world size or stage: what is written and where.
``job`` does it.

out/checkpoint-500-w3/       three ranks; checkpoint-500-z3-w3 where the stage is another, too
  latest                       the tag
  global_step500/...           DeepSpeed's files
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckpt.deprecation import renamed
from ckpt.rewrite import heads, job, targets
from ckpt.rewrite.job import ARGUMENTS, SAME_IN_ENGINE, Rewriting
from ckpt.rewrite.job import execute as execute
from ckpt.rewrite.targets import Settings
from ckpt.runs.foreign import step_records
from ckpt.weights.arguments import naming_arguments
from converters.errors import CheckpointError
from converters.options import EP, STAGE, WORLD_SIZE
from converters.storage import open_files, stores
from converters.storage.store import default_output, output_path
from converters.storage.stores import source_path
from converters.storage.url_path import absolute
from converters.words import counted
from converters.zero import checkpoint as zero
from converters.zero import muon
from converters.zero.files import several_models
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import reader as merging
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import pipeline_files
from converters.zero.native import reshard as native
from converters.zero.native.target import SUB_GROUP, TargetTopology, require_arguments
from converters.zero.parallel import engine_cuts, rules
from converters.zero.parallel.merged_source import TensorParallelCheckpoint


@naming_arguments(*ARGUMENTS)
@open_files.once()
def plan(
    checkpoint: str | os.PathLike[str],
    world_size: int | None = None,
    *,
    stage: int | None = None,
    output: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
    tp: int | None = None,
    ep: int | None = None,
    pp: str | int | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
) -> Rewriting:
    """Plans the same checkpoint for ``world_size`` ranks and a stage;
    by default its own.

    One of tensor parallelism, a pipeline or MiCS becomes one of ZeRO alone or, with
    ``tp``, of that many tensor-parallel ranks among the ``world_size``. ``tp_rules`` is
    a file that says how parameters are cut for them, where the checkpoint does not.
    ``ep`` are the ranks that the experts of each layer are dealt out to; by default as
    many as saved. ``pp`` are the layers and the tied modules of each pipeline stage that a
    pipeline is written for, as text: "0-2+embed,3-+embed"; 1 is one stage with all of them.

    Reads pickles, and what ranks share of Muon's momentum. ``sub_group_size``
    (elements, stage 3) defaults to the run's own. ``zero_init``: whether the engine's
    model will be made under ``zero.Init``; only for Muon, from stage 1 or 2 to 3.
    Raises ``CheckpointError`` for what is damaged, or cannot be cut into other
    partitions.
    """
    require_arguments(tp or 1 if world_size is None else world_size, stage, sub_group_size, tp, ep)
    place = source_path(checkpoint)
    several_models.find(place, tag)  # refuses a choice between models
    with rules.using(tp_rules):
        stages = None if pp is None else str(pp)
        source = merging.read(place, tag, targets.tied_key(stages))
        if world_size is None:
            world_size = merged.original(source).world_size
            require_arguments(world_size, stage, sub_group_size, tp, ep)
        settings = Settings(stage, sub_group_size, zero_init, tp, ep, stages)
        target, tensor_ranks = targets.target_of(source, world_size, settings)
    heads.require_shared(source, target.tensor_ranks, tensor_ranks)
    _require_change(source, target)

    home = job.home_of(source)
    if output is None:
        output = default_output(home, _output_name(source, target))
    saved_world_size = merged.original(source).world_size
    companions = tuple(job.companions_for(home, saved_world_size, world_size))

    return Rewriting(
        source=source,
        path=place,
        target=target,
        plan=targets.file_plan(source, target, tensor_ranks),
        output=absolute(output_path(output)),
        tag=native.tag_folder(source),
        companions=companions,
        notes=(
            *source.notes,
            *step_records.contradictions(source),
            *notes_on(source, target, tensor_ranks),
            *job.notes_on_lost_ranks(companions, world_size),
            *_note_on_files_left_out(home, {path.name for path, _ in companions}),
        ),
        tensor_ranks=tensor_ranks,
    )


def _output_name(source: zero.Checkpoint, target: TargetTopology) -> str:
    """The default name of the output: that of the source, and what is not as it was."""
    stage_part = f"-z{target.stage}" if target.stage != source.stage else ""
    degrees = targets.degrees_in_name(source, target)
    return f"{job.home_of(source).name}{stage_part}{degrees}-w{target.rank_count}"


def _require_change(source: zero.Checkpoint, target: TargetTopology) -> None:
    """``CheckpointError`` if the checkpoint is what is asked for already."""
    saved = merged.original(source)
    degree = len(saved.lanes) if isinstance(saved, TensorParallelCheckpoint) else 1
    is_other = isinstance(source, merged.MergedCheckpoint) and degree == 1
    is_other |= pipeline_files.is_pipeline(source)
    if isinstance(source, ExpertsCheckpoint):
        is_other = source.expert_sizes != (target.expert_ranks,) or source.stage_count > 1
    if target.tensor_ranks != degree or is_other:
        return

    unchanged = target.stage == source.stage and target.world_size == source.world_size
    if target.stage == 3:
        unchanged = unchanged and target.sub_group_size == _sub_group_size(source)
    if unchanged:
        raise CheckpointError(
            f"{source.place.folder} is of stage {source.stage} for "
            f"{counted(saved.world_size, 'rank')} already; load it as it is, or name "
            f"another {_changeable(source)}",
            "output",
        )


def _changeable(source: zero.Checkpoint) -> str:
    """The options that make another checkpoint of it."""
    if isinstance(source, ExpertsCheckpoint):
        return f"{WORLD_SIZE}, {EP} or {STAGE}"
    return f"{WORLD_SIZE} or {STAGE}"


def _note_on_files_left_out(home: Path, companion_names: set[str]) -> Iterator[str]:
    """A line on the files beside the tag's folder that are not copied, if there are any."""
    written_names = {*companion_names, *job.WRITTEN_NAMES}
    names = [
        name
        for name in stores.names(home)
        if name not in written_names and stores.is_file(home / name)
    ]
    if names:
        yield f"not copied: {', '.join(names)}"


def _sub_group_size(source: zero.Checkpoint) -> int:
    """The sub-group size that the run
    of a checkpoint of stage 3 was configured with."""
    configured_size = source.model.setting("zero_optimization", "sub_group_size")
    if isinstance(configured_size, (int, float)):
        return int(configured_size)
    return SUB_GROUP


def notes_on(
    source: zero.Checkpoint, target: TargetTopology, tensor_ranks: TensorRanks | None = None
) -> Iterator[str]:
    """Notes for whoever resumes from ``target``."""
    setting = source.model.setting
    if tensor_ranks is not None:
        yield from _notes_on_shards(target, tensor_ranks)
    yield from _notes_on_ranks(source, target)
    if target.stage == 3 and source.stage < 3:
        yield f"made for sub_group_size {target.sub_group_size}; {SAME_IN_ENGINE}"

    if target.stage < 3 and target.dealt:
        yield "made for round_robin_gradients; the engine must have it, too"
    if setting("zero_optimization", "offload_optimizer", "device") == "nvme":
        yield (
            "made for an engine whose optimizer is not on NVMe: that looks for files "
            "of its own (offloaded_tensors), which are not made here"
        )

    if target.stage < 3 and muon.is_deepspeed_muon(source.model):
        if target.bf16:
            optimizer_kind = "BF16_Optimizer"
        elif target.muon:
            optimizer_kind = "an optimizer that is not offloaded"
        else:
            optimizer_kind = "an offloaded optimizer"
        yield (
            f"Muon: made for {optimizer_kind}; the engine must have the same, or "
            "DeepSpeed takes other elements for the momentum"
        )

    if target.stage < 3 and setting("zero_optimization", "elastic_checkpoint"):
        yield ("elastic_checkpoint: DeepSpeed asks for optimizers that count steps in their groups")


def _notes_on_shards(target: TargetTopology, tensor_ranks: TensorRanks) -> Iterator[str]:
    """A note on how parameters are cut for tensor-parallel ranks, where no engine says it."""
    if engine_cuts.are_known():
        return

    rule = tensor_ranks.head_rule
    if rule is None:
        yield (
            f"made for {target.tensor_ranks} tensor-parallel ranks that cut parameters evenly; an "
            "engine that cuts heads otherwise refuses the shapes"
        )
    elif rule.known_heads is not None:
        shares = ", ".join(map(str, rule.widths((rule.known_heads, True))))
        yield (
            f"made for {rule.rank_count} tensor-parallel ranks of AutoTP, which share "
            f"{counted(rule.known_heads, 'key head')} ({shares}); the engine's model must have as "
            "many"
        )


def _notes_on_ranks(source: zero.Checkpoint, target: TargetTopology) -> Iterator[str]:
    """Notes on ranks that are gone, or are new."""
    saved_world_size = merged.original(source).world_size
    if target.stages:
        yield (
            f"made for the stages {','.join(map(str, target.stages))}; the engine must part its "
            "layers so (DeepSpeed prints them when it starts)"
        )

    if isinstance(source, ExpertsCheckpoint):
        yield (
            f"made for {counted(target.expert_ranks, 'expert rank')}; the ep_size of the engine's "
            "layers (autoep_size of AutoEP) must be the same"
        )

    if target.rank_count > saved_world_size:
        yield (
            f"ranks {saved_world_size} and up did not exist; each reuses the random and extra "
            f"state of (rank mod {saved_world_size})"
        )

    if target.rank_count < saved_world_size:
        yield (
            f"what only ranks {target.rank_count} and up had, such as random states, is left out"
        )


prepare = renamed(plan, "ckpt.reshard.prepare", "ckpt.reshard.plan")
run = renamed(job.run, "ckpt.reshard.run", "ckpt.reshard.execute")
