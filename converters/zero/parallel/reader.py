"""A checkpoint of tensor parallelism as a ``Source``:
the row "deepspeed-model-parallel"."""

from __future__ import annotations

from pathlib import Path

from converters.detect.deepspeed import TENSOR_PARALLEL
from converters.errors import readable
from converters.source import Place
from converters.storage import open_files
from converters.zero.files import discovery, several_models
from converters.zero.parallel import lane_states, lanes, merged_source, rules
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.merged_source import TensorParallelCheckpoint


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> TensorParallelCheckpoint:
    """Locates every tensor of all ranks' files, and says how the shards fit together.

    With ``complete`` everything that a training goes on from has to be there.
    """
    place = discovery.find(path, tag) if complete else several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        return _read(place, complete)


def _read(place: Place, require_all: bool) -> TensorParallelCheckpoint:
    checkpoints = lanes.read(place, require_all)
    table = CutTable.of([each.model for each in checkpoints], rules.current())
    sources = [lane_states.with_states(lane) for lane in checkpoints]
    return merged_source.of_lanes(sources, table, TENSOR_PARALLEL)
