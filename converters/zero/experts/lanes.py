"""The files of experts by model-parallel rank: what each rank of a stage has.

mp_rank_00_*    the shards of tensor-parallel rank 0, and ZeRO's partitions of them
mp_rank_01_*    those of rank 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.source import Place
from converters.zero import checkpoint as zero
from converters.zero.files import all_ranks, state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles


@dataclass(frozen=True, slots=True)
class Lane:
    """The files of a model-parallel rank: its model file, or under stage 3 one for
    each of its data ranks, its optimizer files in rank order, and without ZeRO those of
    its expert ranks."""

    models: tuple[State, ...]
    ranks: tuple[State, ...]
    expert_optimizers: Mapping[int, Path]

    @property
    def model(self) -> State:
        """The first model file."""
        return self.models[0]


def read(place: Place, files: FolderFiles) -> list[Lane]:
    """The lanes by model-parallel rank; ``CheckpointError`` unless all files are there."""
    models_by_lane = _models(place, files)
    if not files.optimizers and not files.expert_optimizers:
        raise zero.no_optimizer_files(place)
    if not files.optimizers:
        label = "expp_rank_*_mp_rank_N_optim_states.pt"
        one_save.require_numbered(place, label, len(models_by_lane), files.expert_optimizers)
        return [
            Lane(tuple(models), (), files.expert_optimizers[number])
            for number, models in enumerate(models_by_lane)
        ]

    label = "zero_pp_rank_*_mp_rank_N_optim_states.pt"
    one_save.require_numbered(place, label, len(models_by_lane), files.optimizers)
    lanes = []
    for number, models in enumerate(models_by_lane):
        ranks = one_save.optimizers_of(place, files.optimizers[number], number)
        if files.partitioned:
            file_kind = all_ranks.of_model_rank("model", number)
            all_ranks.require_ranks(place, len(ranks), files.partitioned[number], file_kind)
        state_files.require_kinds(models, ranks)
        lanes.append(Lane(tuple(models), tuple(ranks), {}))

    sizes = sorted({len(lane.ranks) for lane in lanes})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{place.folder} has model-parallel ranks with {words.numbers(sizes)} optimizer "
            "files, expected as many of each; two saves are mixed"
        )
    return lanes


def _models(place: Place, files: FolderFiles) -> list[list[State]]:
    """The model files of each lane."""
    label = "mp_rank_N_model_states.pt"
    count = max(files.model_ranks) + 1
    if files.partitioned:
        label = f"zero_pp_rank_*_{label}"
        one_save.require_numbered(place, label, count, files.partitioned)
        paths_by_lane = [
            [path for _, path in sorted(files.partitioned[lane].items())] for lane in range(count)
        ]
    else:
        _require_written(place, files)
        one_save.require_numbered(place, label, count, files.models)
        paths_by_lane = [[files.models[lane]] for lane in range(count)]

    models_by_lane = [[folder_files.read(path) for path in paths] for paths in paths_by_lane]
    models = [model for lane_models in models_by_lane for model in lane_models]
    first_models = {lane: members[0] for lane, members in enumerate(models_by_lane)}
    one_save.require_no_further_ranks(place.folder, first_models)
    saved_count = models[0].root.get("mp_world_size")
    if is_whole_number(saved_count) and saved_count > count:
        one_save.require_numbered(place, label, saved_count, range(count))
    one_save.require_same_step(models)
    return models_by_lane


def _require_written(place: Place, files: FolderFiles) -> None:
    """Raises where DeepSpeed wrote no model file of a rank whose optimizer files it wrote.

    0.19.8 leaves it to ranks that write experts, and of these to the first data rank
    (``_save_moe_checkpoint``): where experts that are whole are dealt out to fewer ranks
    than tensor parallelism has, some of its ranks write none.
    """
    missing = sorted(files.optimizers.keys() - files.models.keys())
    if missing and files.models and files.experts:
        raise CheckpointError(
            f"{place.folder} has optimizer files of mp_rank {all_ranks.rank_list(missing)}, and no "
            "model file of it (mp_rank_NN_model_states.pt); copy it here from the save, or train "
            "with a larger ep_size where whole experts are dealt out to fewer ranks than tensor "
            "parallelism has, for DeepSpeed (0.19.8) writes none then",
            "incomplete",
        )


def by_training_rank(members: Sequence[Sequence[State]]) -> list[State]:
    """The files of all lanes as the ranks of the training were numbered: lane by lane of
    the first data rank, then of the second."""
    return [state for lane_members in zip(*members, strict=True) for state in lane_members]
