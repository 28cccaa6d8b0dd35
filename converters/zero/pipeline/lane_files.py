"""The files of a pipeline, by tensor-parallel rank: each rank has a pipeline of shards.

    two stages of two tensor-parallel ranks   rank 0                  rank 1
    stage 0                                   mp_rank_00              mp_rank_01
    stage 1                                   mp_rank_02              mp_rank_03
    layer 3                                   layer_03-model_00       layer_03-model_01

A lane is what one tensor-parallel rank has; without tensor parallelism there is one.
Source: DeepSpeed 0.19.8 ``runtime/pipe/topology.py`` (``PipelineParallelGrid``: model
ranks run along the tensor axis first), ``runtime/engine.py``
(``checkpoint_parallel_dimensions``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.accessors import is_whole_number
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.source import Place
from converters.storage import misplaced_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles


@dataclass(frozen=True, slots=True)
class LaneFiles:
    """The files of one tensor-parallel rank.

    ``models`` are those of its stages in order, by their model rank, ``optimizers``
    their partitions by model rank and data rank, ``layers`` by their number.
    """

    models: Mapping[int, State]
    optimizers: Mapping[int, Mapping[int, Path]]
    layers: Mapping[int, State]


def read(place: Place, files: FolderFiles) -> list[LaneFiles]:
    """The lanes by tensor-parallel rank; ``CheckpointError`` unless all files are there."""
    models = _models(place, files)
    degree = _tensor_degree(files, models)
    _require_layers(place, files, degree)
    if len(models) % degree:
        raise CheckpointError(
            f"{place.folder} has layer files of {degree} tensor-parallel ranks, and {len(models)} "
            "model-parallel ranks, which are no whole stages; two saves are mixed"
        )
    if files.optimizers:
        label = "zero_pp_rank_*_mp_rank_N_optim_states.pt"
        one_save.require_numbered(place, label, len(models), files.optimizers)

    layers = {key: folder_files.read(path) for key, path in sorted(files.layers.items())}
    lanes = []
    for lane in range(degree):
        ranks = range(lane, len(models), degree)
        lanes.append(
            LaneFiles(
                {rank: models[rank] for rank in ranks},
                {rank: files.optimizers[rank] for rank in ranks if files.optimizers},
                {layer: state for (layer, rank), state in layers.items() if rank == lane},
            )
        )

    return lanes


def _models(place: Place, files: FolderFiles) -> list[State]:
    """The model files of all stages in order; ``CheckpointError`` unless all are there."""
    label = "mp_rank_N_model_states.pt"
    one_save.require_numbered(place, label, max(files.model_ranks, default=0) + 1, files.models)
    models = [folder_files.read(path) for _, path in sorted(files.models.items())]
    world_size = models[0].root.get("mp_world_size")
    if isinstance(world_size, int):
        one_save.require_numbered(place, label, world_size, files.models)

    one_save.require_same_step(models)
    if files.experts or any(model.root.get("num_experts") for model in models):
        raise CheckpointError(
            f"{models[0].path} is of a pipeline with experts, whose files "
            "(layer_N_expert_*_model_states.pt) are missing; copy them here from the save"
            f"{misplaced_files.missing(place.folder)}",
            "incomplete",
        )
    return models


def _tensor_degree(files: FolderFiles, models: Sequence[State]) -> int:
    """The tensor-parallel ranks of a stage.

    What the model file says is true only where it goes with the number of files: under
    sequence parallelism it says that degree. Before 0.19.5 the names of layer files say
    it.
    """
    recorded = models[0].root.get("checkpoint_parallel_dimensions")
    degrees = recorded if isinstance(recorded, dict) else {}
    stages, degree = degrees.get("pp_degree"), degrees.get("tp_degree")
    if is_whole_number(stages, 1) and is_whole_number(degree, 1) and stages * degree == len(models):
        return degree
    return max((rank for _, rank in files.layers), default=0) + 1


def _require_layers(place: Place, files: FolderFiles, degree: int) -> None:
    """Raises unless every tensor-parallel rank has the files of the same layers."""
    by_form = {_has_rank(path): path.name for path in files.layers.values()}
    if len(by_form) > 1:
        raise CheckpointError(
            f"{place.folder} has {by_form[True]}, which names a tensor-parallel rank, and "
            f"{by_form[False]}, which names none; two saves are mixed: move the older files away"
        )

    label = "layer_*-model_N-model_states.pt"
    ranks = {rank for _, rank in files.layers}
    one_save.require_numbered(place, label, degree, ranks)
    for layer in sorted({layer for layer, _ in files.layers}):
        label = f"layer_{layer:02d}-model_N-model_states.pt"
        present = {rank for number, rank in files.layers if number == layer}
        one_save.require_numbered(place, label, degree, present)


def _has_rank(path: Path) -> bool:
    """Whether a layer file's name has the tensor-parallel rank; those of one save all
    have it, or none has."""
    match = filenames.LAYER.fullmatch(path.name)
    return match is not None and match["tensor"] is not None
