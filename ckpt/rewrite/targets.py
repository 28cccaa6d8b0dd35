"""The topology that a rewriting is for: which one a user means, and its files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from converters import words
from converters.errors import CheckpointError
from converters.options import EP, PP, TP, WORLD_SIZE
from converters.plan import Plan
from converters.zero import checkpoint as zero
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint, is_expert
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import (
    example_stages,
    expert_files,
    pipeline_files,
    stage_layers,
    unpartitioned_files,
)
from converters.zero.native import reshard as native
from converters.zero.native.expert_ranks import require_whole_experts
from converters.zero.native.stage_layers import StageLayers
from converters.zero.native.target import TargetTopology


@dataclass(frozen=True, slots=True)
class Settings:
    """The wishes of a user beside the number of ranks; ``None`` is the run's own."""

    stage: int | None = None
    sub_group_size: int | None = None
    zero_init: bool | None = None
    tp: int | None = None
    ep: int | None = None
    pp: str | None = None


def target_of(
    source: zero.Checkpoint, world_size: int, settings: Settings
) -> tuple[TargetTopology, TensorRanks | None]:
    """The topology, and how parameters are cut for several tensor-parallel ranks.

    ``CheckpointError`` for what cannot be cut up so.
    """
    if settings.pp is not None and not _is_plain(source, settings.pp):
        return _of_stages(source, world_size, settings), None
    degree = settings.tp or 1
    expert_ranks = _expert_ranks(source, settings.ep)
    tensor_ranks = None
    if degree > 1 and isinstance(source, ExpertsCheckpoint):
        tensor_ranks = _of_experts(source, degree, expert_ranks)
    elif degree > 1:
        tensor_ranks = TensorRanks.of(source, degree)
    target = native.target(
        source,
        settings.stage,
        world_size // degree,
        settings.sub_group_size,
        settings.zero_init,
    )
    return replace(target, tensor_ranks=degree, expert_ranks=expert_ranks), tensor_ranks


def _of_experts(source: ExpertsCheckpoint, degree: int, expert_ranks: int) -> TensorRanks:
    """How parameters are cut for tensor-parallel ranks, the experts as well where they are:
    as saved, or where no rank had shards, as the rules say."""
    if not source.layers and source.cuts_experts is not False:
        tensor_ranks = TensorRanks.of(source, degree)
        is_cut = any(
            not layout.is_replicated
            for name, layout in tensor_ranks.layouts.items()
            if is_expert(name, set())
        )
        if source.cuts_experts or is_cut:
            return tensor_ranks

    require_whole_experts(source, expert_ranks, degree)
    return TensorRanks.of(source.dense, degree)


def file_plan(
    source: zero.Checkpoint, target: TargetTopology, tensor_ranks: TensorRanks | None
) -> Plan:
    """The files of the target."""
    if not target.stage:
        return unpartitioned_files.plan(source, target, tensor_ranks)
    if isinstance(source, ExpertsCheckpoint):
        return expert_files.plan(source, target, tensor_ranks)
    if target.stages and isinstance(source, MergedCheckpoint):
        return pipeline_files.plan(source, target)
    return native.plan(source, target, tensor_ranks)


def degrees_in_name(source: zero.Checkpoint, target: TargetTopology) -> str:
    """The part of the output's default name on degrees, where they are not as they were."""
    stage_part = f"-pp{len(target.stages)}" if target.stages else ""
    tensor_part = f"-tp{target.tensor_ranks}" if target.tensor_ranks > 1 else ""
    expert_part = ""
    if isinstance(source, ExpertsCheckpoint) and source.expert_sizes != (target.expert_ranks,):
        expert_part = f"-ep{target.expert_ranks}"
    return stage_part + tensor_part + expert_part


def _of_stages(source: zero.Checkpoint, world_size: int, settings: Settings) -> TargetTopology:
    """The topology of a pipeline; ``CheckpointError`` for what is not written for its stages."""
    assert settings.pp is not None
    _require_alone(source, settings)
    stages = _stages(source, settings.pp)
    if world_size % len(stages):
        raise CheckpointError(
            f"{source.place.folder} is not written for {words.counted(len(stages), 'stage')} among "
            f"{words.counted(world_size, 'rank')}: each stage of {PP} has as many ranks; name "
            f"another {WORLD_SIZE}",
            "refused",
        )
    stage = settings.stage if settings.stage is not None else max(source.stage, 1)
    target = native.target(source, stage, world_size // len(stages))
    assert isinstance(source, MergedCheckpoint)
    target = replace(target, stages=stages, expert_ranks=_expert_ranks(source, settings.ep))
    pipeline_files.require(source, target)
    return target


def _require_alone(source: zero.Checkpoint, settings: Settings) -> None:
    """Raises for options that do not go with stages."""
    has_experts = isinstance(source, ExpertsCheckpoint)
    degrees = {TP: settings.tp, **({} if has_experts else {EP: settings.ep})}
    for option, degree in degrees.items():
        if degree not in (None, 1):
            raise CheckpointError(
                f"{source.place.folder} is written for the stages of {PP} alone, not with "
                f"{option}; leave one of them out",
                "refused",
            )


def _is_plain(source: zero.Checkpoint, pp: str) -> bool:
    """Whether one stage is asked for of what is no pipeline: it is that already."""
    return example_stages.count_in(pp) == 1 and not pipeline_files.is_pipeline(source)


def _stages(source: zero.Checkpoint, pp: str) -> tuple[StageLayers, ...]:
    """The stages that an option says; ``CheckpointError`` for a number of several, with an
    example, and for stages that are none of the checkpoint."""
    stage_count = example_stages.count_in(pp)
    if isinstance(source, ExpertsCheckpoint) and source.stage_count > 1:
        return stage_layers.for_experts(source, () if stage_count else stage_layers.parse(pp))

    pipeline = pipeline_files.source_of(source)
    assert isinstance(source, MergedCheckpoint)
    stages: tuple[StageLayers, ...] = (StageLayers(0, None),)
    if stage_count is None:
        stages = stage_layers.parse(pp)
    elif stage_count > 1:
        raise example_stages.refusal(source, pipeline, stage_count)
    return stage_layers.for_checkpoint(source, pipeline, stages)


def _expert_ranks(source: zero.Checkpoint, ep: int | None) -> int:
    """The ranks to deal the experts out to;
    ``CheckpointError`` where that cannot be known."""
    folder = source.place.folder
    if not isinstance(source, ExpertsCheckpoint):
        if ep not in (None, 1):
            raise CheckpointError(
                f"{folder} has no experts to deal out; leave out {EP}", "unsupported"
            )
        return 1

    if ep is None and len(source.expert_sizes) != 1:
        sizes = words.numbers(source.expert_sizes)
        raise CheckpointError(
            f"{folder} has layers whose experts are dealt out to {sizes} ranks, and DeepSpeed, "
            "which orders their param groups by chance on each rank, does not load such a "
            f"checkpoint; name one number for all layers with {EP}, and give the engine's layers "
            "the same ep_size",
            "unsupported",
        )
    return ep or source.expert_sizes[0]
