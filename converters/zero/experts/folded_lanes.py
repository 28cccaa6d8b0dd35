"""The files of AutoEP with AutoTP,
by tensor-parallel rank, and what they say of experts.

Every file has ``folding``: which tensor-parallel rank and which expert rank wrote it.
Source: DeepSpeed 0.19.8 ``checkpoint/autoep_universal.py`` (``make_folding_metadata``).
"""

from __future__ import annotations

from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place
from converters.zero.experts import lanes
from converters.zero.experts.lanes import Lane
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import one_save
from converters.zero.model_ranks.folder_files import FolderFiles

KEY = "folding"
VERSION = 1


def read(place: Place, files: FolderFiles) -> list[Lane]:
    """The lanes by tensor-parallel rank; ``CheckpointError`` unless all files are there."""
    result = lanes.read(place, files)
    degree = _degree(result[0].model)
    label = f"{'zero_pp_rank_*_' if files.partitioned else ''}mp_rank_N_model_states.pt"
    one_save.require_numbered(place, label, degree, range(len(result)))
    for number, lane in enumerate(result):
        for state in (*lane.models, *lane.ranks):
            _require_lane(state, number, degree)

    return result


def folding(state: State) -> Section:
    """The entry of a file on the rank that wrote it;
    ``CheckpointError`` if there is none."""
    return state.fields.section(KEY)


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
