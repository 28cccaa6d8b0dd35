"""The files of each model-parallel rank, read as a checkpoint of its own.

    mp_rank_00_*    the shards of tensor-parallel rank 0, and ZeRO's partitions of them
    mp_rank_01_*    those of rank 1

A lane is what one such rank has. ZeRO partitions it over the data-parallel ranks, so its
files are those of a training without tensor parallelism, and are read as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters import words
from converters.accessors import is_whole_number, missing_numbers
from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place
from converters.storage import misplaced_files
from converters.zero import checkpoint as zero
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import all_ranks, discovery, state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import one_save

_KEY = "checkpoint_parallel_dimensions"


def read(place: Place, require_all: bool) -> tuple[Checkpoint, ...]:
    """The lanes of a checkpoint, by model-parallel rank.

    ``CheckpointError`` for missing ranks, files of several saves, and pipelines;
    ``ExpertsError`` for experts.
    """
    files_by_rank = discovery.lanes(place)
    _require_numbered(place, sorted(files_by_rank), max(files_by_rank) + 1)
    one_save.require_no_further_ranks(place.folder, _first_models(files_by_rank))
    lanes = [
        zero.read_files(place, files_by_rank[rank], require_all, rank)
        for rank in sorted(files_by_rank)
    ]
    count = lanes[0].model.root.get("mp_world_size")
    if is_whole_number(count, 1):
        _require_numbered(place, sorted(files_by_rank), count)
    _refuse_pipeline(lanes[0].model, len(lanes))
    one_save.require_same_step([lane.model for lane in lanes])
    for lane in lanes[1:]:
        _require_same_save(lanes[0], lane)

    return tuple(lanes)


def _first_models(files_by_rank: Mapping[int, discovery.Files]) -> dict[int, State]:
    """A model file of each rank that has one."""
    paths_by_rank = {
        rank: files.module or next(iter(files.partitioned.values()), None)
        for rank, files in files_by_rank.items()
    }
    return {rank: state_files.read(path) for rank, path in paths_by_rank.items() if path}


def _require_numbered(place: Place, ranks: Sequence[int], count: int) -> None:
    missing_ranks = missing_numbers(count, ranks)
    if missing_ranks:
        raise CheckpointError(
            f"{place.folder} was saved by {count} model-parallel ranks, but has no files of "
            f"mp_rank_{missing_ranks[0]:02d}; copy those of rank "
            f"{all_ranks.rank_list(missing_ranks)} here{misplaced_files.missing(place.folder)}",
            "incomplete",
        )


def _refuse_pipeline(model: State, count: int) -> None:
    """``CheckpointError`` where model-parallel ranks are stages,
    or not all tensor parallel.

    Source: DeepSpeed 0.19.5 ``runtime/engine.py`` (``_checkpoint_parallel_metadata``).
    """
    degrees = model.root.get(_KEY)
    if not isinstance(degrees, dict):
        return

    stages, tensor_parallel = degrees.get("pp_degree"), degrees.get("tp_degree")
    if stages != 1 or tensor_parallel != count:
        raise CheckpointError(
            f"{model.path} says {_KEY}: pp_degree {state_files.shown(stages)}, tp_degree "
            f"{state_files.shown(tensor_parallel)}, and there are files of "
            f"{words.counted(count, 'model-parallel rank')}, but none of a pipeline's layers "
            "(layer_NN-model_states.pt); which rank has which part cannot be told: "
            f"{LOAD_THERE}",
            "unsupported",
        )


def _require_same_save(first: Checkpoint, lane: Checkpoint) -> None:
    """``CheckpointError`` unless two lanes are of one save."""
    if first.topology != lane.topology:
        raise lane.model.fail(
            f"its {lane.world_size} ranks of ZeRO stage {lane.stage} do not go with the "
            f"{first.world_size} of stage {first.stage} of {first.model.path.name}; files of "
            "two saves are mixed"
        )
    if first.ranks and lane.ranks:
        first_state, state = first.ranks[0], lane.ranks[0]
        progress = state_files.progress(first_state)
        all_ranks.require_same_progress(first_state, progress, state, state_files.progress(state))
