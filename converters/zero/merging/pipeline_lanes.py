"""Pipelines of tensor-parallel stages (3D):
each lane a pipeline of shards, all of them as one.

    lane 0   stage 0: embed/0, 1/0   stage 1: 2/0, 3/0      param groups of the shards /0
    lane 1   stage 0: embed/1, 1/1   stage 1: 2/1, 3/1      and of the shards /1
    whole    embed, 1, 2, 3                                 shards joined as they were cut

What only a layer file has (buffers) is that of the first lane, as every rank has it
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from converters.errors import CheckpointError
from converters.source import Source
from converters.zero.merging import agreement, numbered_pipeline, pipeline, tensor_parallel
from converters.zero.merging.checkpoint import MergedCheckpoint, whole_model
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline.stages import PipelineCheckpoint
from converters.zero.pipeline.unpartitioned import UnpartitionedPipeline


def merged(source: Source, tied_key: str | None = None) -> MergedCheckpoint:
    """The checkpoint of the whole model,
    of a pipeline with or without tensor parallelism.

    ``tied_key`` is the key of a tied module that no file names. ``CheckpointError`` for
    one whose states have no names, or whose ranks do not belong together.
    """
    if isinstance(source, UnpartitionedPipeline):
        return numbered_pipeline.merged(source, tied_key)
    if isinstance(source, PipelineCheckpoint):
        return pipeline.merged(source)
    if not isinstance(source, TensorParallelCheckpoint):
        raise TypeError(f"{source.kind} is no pipeline")

    tensor_parallel.require_no_averages(source)
    lanes = [_lane(lane) for lane in source.lanes]
    first = lanes[0]
    groups = list(_groups(source, lanes))
    values = {**source.weights.tensors, **first.model.module}
    model = whole_model(first.model, source.weights, groups, values, first.topology)
    return MergedCheckpoint(
        kind=source.kind,
        place=source.place,
        topology=first.topology,
        precision=first.precision,
        step=source.step,
        version=source.version,
        files=source.files,
        weights=source.weights,
        entries=source.entries,
        notes=(*source.notes, *tensor_parallel.notes_on_vocabularies(source)),
        without_frozen=source.without_frozen,
        model=model,
        ranks=first.ranks,
        source=source,
        groups=tuple(groups),
        universal_entries=tensor_parallel.universal_entries_of(source, source.entries),
        model_paths=first.model_paths,
        layer_nodes=first.layer_nodes,
        changes=first.changes,
        cuts=source.cuts,
        tensor_ranks=len(lanes),
    )


def _groups(
    source: TensorParallelCheckpoint, lanes: Sequence[MergedCheckpoint]
) -> Iterator[ParamGroup]:
    """The param groups of the whole model, from what each tensor-parallel rank has of them."""
    groups_by_lane = [lane.groups for lane in lanes]
    paths = [lane.ranks[0].path for lane in lanes]
    agreement.require_same_count(paths, groups_by_lane)
    for index, lane_groups in enumerate(zip(*groups_by_lane, strict=True)):
        agreement.require_same_settings(index, paths, lane_groups)
        yield tensor_parallel.group_of(source, lane_groups)


def _lane(lane: Source) -> MergedCheckpoint:
    """The pipeline of shards of one tensor-parallel rank."""
    if not isinstance(lane, PipelineCheckpoint):
        raise CheckpointError(
            f"{lane.place.folder} is of tensor-parallel stages without ZeRO, whose optimizers "
            "number the parameters of each stage: it loads on as many stages only; ckpt to-fp32 "
            "takes its weights",
            "unsupported",
        )
    return pipeline.merged(lane)
