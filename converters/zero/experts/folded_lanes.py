"""The files of AutoEP with AutoTP,
by tensor-parallel rank, and what they say of experts.

Every file has ``folding``: which tensor-parallel rank and which expert rank wrote it.
Source: DeepSpeed 0.19.8 ``checkpoint/autoep_universal.py`` (``make_folding_metadata``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from converters import words
from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place
from converters.zero import checkpoint as zero
from converters.zero.files import all_ranks, state_files
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles

KEY = "folding"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Lane:
    """The files of a tensor-parallel rank: its model file, or under stage 3 one for
    each of its data ranks, and its optimizer files in rank order."""

    models: tuple[State, ...]
    ranks: tuple[State, ...]

    @property
    def model(self) -> State:
        """The first model file."""
        return self.models[0]


def read(place: Place, files: FolderFiles) -> list[Lane]:
    """The lanes by tensor-parallel rank; ``CheckpointError`` unless all files are there."""
    models_by_lane = _models(place, files)
    if not files.optimizers:
        if files.expert_optimizers:
            raise CheckpointError(
                f"{place.folder} is of AutoEP and AutoTP without ZeRO; merging that is not "
                f"supported yet: {LOAD_THERE}",
                "unsupported",
            )
        raise zero.no_optimizer_files(place)

    label = "zero_pp_rank_*_mp_rank_N_optim_states.pt"
    one_save.require_numbered(place, label, len(models_by_lane), files.optimizers)
    lanes = []
    for number, models in enumerate(models_by_lane):
        ranks = one_save.optimizers_of(place, files.optimizers[number], number)
        if files.partitioned:
            file_kind = all_ranks.of_model_rank("model", number)
            all_ranks.require_ranks(place, len(ranks), files.partitioned[number], file_kind)
        state_files.require_kinds(models, ranks)
        lanes.append(Lane(tuple(models), tuple(ranks)))
        for state in (*models, *ranks):
            _require_lane(state, number, len(models_by_lane))

    sizes = sorted({len(lane.ranks) for lane in lanes})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{place.folder} has tensor-parallel ranks with {words.numbers(sizes)} optimizer "
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
        one_save.require_numbered(place, label, count, files.models)
        paths_by_lane = [[files.models[lane]] for lane in range(count)]

    models_by_lane = [[folder_files.read(path) for path in paths] for paths in paths_by_lane]
    models = [model for models in models_by_lane for model in models]
    if not all(isinstance(model.root.get(KEY), dict) for model in models):
        raise one_save.experts_and_more(place)
    one_save.require_numbered(place, label, _degree(models[0]), range(count))
    one_save.require_same_step(models)
    return models_by_lane


def folding(state: State) -> Section:
    """The entry of a file on the rank that wrote it;
    ``CheckpointError`` if there is none."""
    return state.fields.section(KEY)


def by_training_rank(members: Sequence[Sequence[State]]) -> list[State]:
    """The files of all lanes as the ranks of the training were numbered: lane by lane of
    the first data rank, then of the second."""
    return [state for lane_members in zip(*members, strict=True) for state in lane_members]


def _degree(model: State) -> int:
    return folding(model).required("tp_size", int)


def _require_lane(state: State, number: int, count: int) -> None:
    """Raises unless a file is of this tensor-parallel rank, and of a known form."""
    fields = folding(state)
    version, inner_size = fields.required("version", int), fields.required("etp_size", int)
    if version != VERSION or inner_size != 1:
        raise CheckpointError(
            f"{state.path} has experts of version {version} that are cut for {inner_size} "
            f"tensor-parallel ranks, and version {VERSION} for 1 is read; {LOAD_THERE}",
            "unsupported",
        )
    if (fields.required("tp_rank", int), _degree(state)) != (number, count):
        raise state.fail(
            f"is of tensor-parallel rank {fields.values['tp_rank']} of {_degree(state)}, expected "
            f"rank {number} of {count}; give each file back its own name"
        )
