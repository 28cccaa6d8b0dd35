"""The topology that a rewriting is for: which one a user means, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpt.rewrite import heads
from converters import words
from converters.errors import CheckpointError
from converters.options import EP, PP, TP, WORLD_SIZE
from converters.plan import Plan
from converters.zero import checkpoint as zero
from converters.zero.files.state_files import Shape
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint, is_expert
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import (
    expert_files,
    pipeline_files,
    unpartitioned_files,
)
from converters.zero.native import reshard as native
from converters.zero.native.expert_ranks import require_whole_experts
from converters.zero.native.stages import example_stages, stage_layers
from converters.zero.native.stages.stage_layers import StageLayers
from converters.zero.native.target import TargetTopology
from converters.zero.pipeline.stages import PipelineCheckpoint


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
        return _of_stages(source, world_size, settings)
    degree = settings.tp or 1
    expert_ranks = _expert_ranks(source, settings.ep)
    if degree > 1 and isinstance(source, ExpertsCheckpoint):
        tensor_ranks = _of_experts(source, degree, expert_ranks)
    else:
        tensor_ranks = _tensor_ranks(source, source, degree)
    target = native.target(
        source,
        settings.stage,
        world_size // degree,
        settings.sub_group_size,
        settings.zero_init,
    )
    if tensor_ranks is not None and target.stage == 3:
        tensor_ranks.require_elements()
    return replace(target, tensor_ranks=degree, expert_ranks=expert_ranks), tensor_ranks


def _of_experts(source: ExpertsCheckpoint, degree: int, expert_ranks: int) -> TensorRanks | None:
    """How parameters are cut for tensor-parallel ranks, the experts as well where they are:
    as saved, or where no rank had shards, as the rules say."""
    if not source.layers and source.cuts_experts is not False:
        tensor_ranks = TensorRanks.of(source, degree, heads.key_heads(source))
        is_cut = any(
            not layout.is_replicated
            for name, layout in tensor_ranks.layouts.items()
            if is_expert(name, set())
        )
        if source.cuts_experts or is_cut:
            return tensor_ranks

    require_whole_experts(source, expert_ranks, degree)
    return _tensor_ranks(source, source.dense, degree)


def file_plan(
    source: zero.Checkpoint, target: TargetTopology, tensor_ranks: TensorRanks | None
) -> Plan:
    """The files of the target."""
    has_experts = isinstance(source, ExpertsCheckpoint)
    if not target.stage and (has_experts or not target.stages):
        return unpartitioned_files.plan(source, target, tensor_ranks)
    if isinstance(source, ExpertsCheckpoint):
        return expert_files.plan(source, target, tensor_ranks)
    if target.stages and isinstance(source, MergedCheckpoint):
        return pipeline_files.plan(source, target, tensor_ranks)
    return native.plan(source, target, tensor_ranks)


def degrees_in_name(source: zero.Checkpoint, target: TargetTopology) -> str:
    """The part of the output's default name on degrees, where they are not as they were."""
    stage_part = f"-pp{len(target.stages)}" if target.stages else ""
    tensor_part = f"-tp{target.tensor_ranks}" if target.tensor_ranks > 1 else ""
    expert_part = ""
    if isinstance(source, ExpertsCheckpoint) and source.expert_sizes != (target.expert_ranks,):
        expert_part = f"-ep{target.expert_ranks}"
    return stage_part + tensor_part + expert_part


def _of_stages(
    source: zero.Checkpoint, world_size: int, settings: Settings
) -> tuple[TargetTopology, TensorRanks | None]:
    """The topology of a pipeline; ``CheckpointError`` for what is not written for its stages."""
    assert settings.pp is not None
    if isinstance(source, ExpertsCheckpoint) and source.stage_count > 1:
        return _of_expert_stages(source, world_size, settings, settings.pp), None
    pipeline = pipeline_files.source_of(source)
    assert isinstance(source, MergedCheckpoint)
    degree = settings.tp or 1
    tensor_ranks = _tensor_ranks(source, source, degree)
    shapes = (
        tensor_ranks.shapes_of(0)
        if tensor_ranks
        else {n: t.shape for n, t in source.weights.tensors.items()}
    )
    stages = _stages(source, pipeline, settings.pp, shapes)
    if settings.ep not in (None, 1) or world_size % (len(stages) * degree):
        by_ranks = f" of {words.counted(degree, 'tensor-parallel rank')}" if degree > 1 else ""
        raise CheckpointError(
            f"{source.place.folder} is not written for {words.counted(len(stages), 'stage')}"
            f"{by_ranks} among {words.counted(world_size, 'rank')} so; the stages of {PP} have as "
            f"many ranks each, divided among the ranks of {TP}, and no {EP}",
            "refused",
        )
    is_numbered = source.optimizer_entries is not None  # in fp32 without ZeRO
    stage = settings.stage
    if stage is None:
        stage = 0 if is_numbered else max(source.stage, 1)
    target = replace(
        native.target(source, stage, world_size // len(stages) // degree),
        tensor_ranks=degree,
        stages=stage_layers.for_checkpoint(source, pipeline, stages),
    )
    pipeline_files.require(source, target)
    return target, tensor_ranks


def _of_expert_stages(
    source: ExpertsCheckpoint, world_size: int, settings: Settings, pp: str
) -> TargetTopology:
    """The same of a pipeline with experts, whose stages have no tensor-parallel ranks."""
    if settings.tp not in (None, 1):
        raise CheckpointError(
            f"{source.place.folder} has experts, which are written for the stages of {PP} alone, "
            f"not with {TP}; leave one of them out",
            "refused",
        )

    is_number = example_stages.count_in(pp) is not None
    stages = stage_layers.for_experts(source, () if is_number else stage_layers.parse(pp))
    if world_size % len(stages):
        raise CheckpointError(
            f"{source.place.folder} is not written for {words.counted(len(stages), 'stage')} among "
            f"{words.counted(world_size, 'rank')}: each stage of {PP} has as many ranks; name "
            f"another {WORLD_SIZE}",
            "refused",
        )

    stage = settings.stage if settings.stage is not None else max(source.stage, 1)
    target = native.target(source, stage, world_size // len(stages))
    target = replace(target, stages=stages, expert_ranks=_expert_ranks(source, settings.ep))
    pipeline_files.require(source, target)
    return target


def _tensor_ranks(
    source: zero.Checkpoint, dense: zero.Checkpoint, degree: int
) -> TensorRanks | None:
    """How the ``dense`` part of a checkpoint is cut for several tensor-parallel ranks."""
    return TensorRanks.of(dense, degree, heads.key_heads(source)) if degree > 1 else None


def tied_key(pp: str | None) -> str | None:
    """The only key of a tied module in the stages that an option says."""
    if pp is None or example_stages.count_in(pp) is not None:
        return None
    keys = {key for stage in stage_layers.parse(pp) for key in stage.tied}
    return keys.pop() if len(keys) == 1 else None


def _is_plain(source: zero.Checkpoint, pp: str) -> bool:
    """Whether one stage is asked for of what is no pipeline: it is that already."""
    return example_stages.count_in(pp) == 1 and not pipeline_files.is_pipeline(source)


def _stages(
    source: MergedCheckpoint, pipeline: PipelineCheckpoint, pp: str, shapes: Mapping[str, Shape]
) -> tuple[StageLayers, ...]:
    """The stages that an option says; ``CheckpointError``, with an example, for a number of
    several."""
    stage_count = example_stages.count_in(pp)
    if stage_count is None:
        return stage_layers.parse(pp)
    if stage_count > 1:
        raise example_stages.refusal(source, pipeline, stage_count, shapes)
    return (StageLayers(0, None),)


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
