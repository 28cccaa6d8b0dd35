"""DeepSpeed-MoE in a pipeline, on tensor-parallel ranks, or both.

    stage 0   mp_rank_00_model_states.pt   1.norm, 1.moe.gate    layer_0_expert_E_mp_rank_00_...
    stage 1   mp_rank_01_...               4.norm, 4.moe.gate    layer_0_expert_E_mp_rank_01_...
    stage 2   mp_rank_02_...               (without experts)     layer_06-model_states.pt, ...

A stage that has experts keeps its layers in its model file, under the names of the
pipeline, and counts its layers of experts from 0. One that has none writes the files of
its layers, as any pipeline does (``converters.zero.pipeline``). Of a tied module the
copy of the first stage is the model's. Stages may have tensor-parallel ranks, whose
experts ``native_lanes`` tells. Source: DeepSpeed 0.19.8 ``runtime/engine.py``
(``_save_moe_checkpoint``, ``_save_checkpoint``), ``runtime/pipe/topology.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converters.accessors import is_whole_number
from converters.detect.deepspeed import EXPERTS, LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source
from converters.zero.experts import joined_stages, lanes, native_lanes
from converters.zero.experts.lanes import Lane
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.parallel import merged_source, rules
from converters.zero.parallel.cut_table import CutTable
from converters.zero.pipeline import stages as pipeline_stages
from converters.zero.pipeline import tied_modules
from converters.zero.pipeline.lane_files import LaneFiles


def read(place: Place, files: FolderFiles) -> Source:
    """The weights of the model with all its experts, and the optimizer's state by name.

    ``CheckpointError`` for what is damaged or incomplete.
    """
    members = lanes.read(place, files)
    stages = stages_of(place, members)
    degree = len(stages[0])
    expert_stages: list[list[Source]] = []
    other_ranks: list[int] = []
    whole_names: frozenset[str] = frozenset()
    for stage in stages:
        if not has_experts(files, stage):
            other_ranks += stage
            continue
        sources, names = native_lanes.of_stage(place, files, stage)
        expert_stages.append(sources)
        whole_names |= names

    if not expert_stages:
        raise members[0].model.fail("has no num_experts, and there are no files of experts")
    by_lane = [list(sources) for sources in zip(*expert_stages, strict=True)]
    for lane, sources in enumerate(by_lane):
        ranks = [rank for rank in other_ranks if rank % degree == lane]
        if ranks:
            sources.append(_without_experts(place, files, members, ranks, lane, sources))

    one_save.require_same_progress([rank for member in members for rank in member.ranks])
    wholes = [joined_stages.joined(sources) for sources in by_lane]
    if degree == 1:
        return wholes[0]
    table = CutTable.of([member.model for member in members[:degree]], rules.current())
    return merged_source.of_lanes(wholes, replace(table, whole_names=whole_names), EXPERTS)


def stages_of(place: Place, members: Sequence[Lane]) -> list[dict[int, Lane]]:
    """The files of each stage by model-parallel rank."""
    degree = _tensor_degree(place, members)
    return [
        {rank: members[rank] for rank in range(first, first + degree)}
        for first in range(0, len(members), degree)
    ]


def has_experts(files: FolderFiles, stage: Mapping[int, Lane]) -> bool:
    """Whether a stage has layers with experts."""
    has_files = any(rank in stage for _, _, rank in files.experts)
    return has_files or bool(stage[min(stage)].model.root.get("num_experts"))


def _tensor_degree(place: Place, members: Sequence[Lane]) -> int:
    """The tensor-parallel ranks of a stage.

    The model file says it since 0.19.5; before, stages are known by the names of their
    layers, which no other stage has.
    """
    recorded = members[0].model.root.get("checkpoint_parallel_dimensions")
    degrees = recorded if isinstance(recorded, dict) else {}
    stages, degree = degrees.get("pp_degree"), degrees.get("tp_degree")
    if (
        is_whole_number(stages, 1)
        and is_whole_number(degree, 1)
        and stages * degree == len(members)
    ):
        return degree

    names = [_names(member.model) for member in members]
    degree = next((rank for rank in range(1, len(names)) if not names[0] & names[rank]), len(names))
    if len(members) % degree:
        raise CheckpointError(
            f"{place.folder} has {len(members)} model-parallel ranks, which are no whole stages "
            f"of {degree}; two saves are mixed"
        )
    return degree


def _names(model: State) -> set[str]:
    """The names of a rank's parameters, but for tied modules, which several stages have."""
    shapes = state_files.shapes(model, "param_shapes") or []
    names = {name for group in shapes for name in group} or set(model.module)
    return {name for name in names if tied_modules.key_of(name) is None}


def _without_experts(
    place: Place,
    files: FolderFiles,
    members: Sequence[Lane],
    ranks: Sequence[int],
    lane: int,
    expert_stages: Sequence[Source],
) -> Source:
    """What the stages of a lane have that are without experts."""
    if not files.optimizers:
        raise CheckpointError(
            f"{place.folder} is of a pipeline without ZeRO, some of whose stages have experts and "
            f"some have not; merging both is not supported yet: {LOAD_THERE}",
            "unsupported",
        )

    elsewhere = {
        key
        for source in expert_stages
        for name in source.weights.order
        if (key := tied_modules.key_of(name)) is not None
    }
    layers: Mapping[int, State] = {
        layer: folder_files.read(path)
        for (layer, tensor_rank), path in sorted(files.layers.items())
        if tensor_rank == lane
    }
    lane_files = LaneFiles(
        {rank: members[rank].model for rank in ranks},
        {rank: files.optimizers[rank] for rank in ranks},
        layers,
    )
    return pipeline_stages.read(place, lane_files, elsewhere)
