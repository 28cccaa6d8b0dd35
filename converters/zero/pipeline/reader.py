"""A pipeline's states as a ``Source``:
the row "deepspeed-pipeline" of ``converters.detect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.detect.deepspeed import PIPELINE
from converters.errors import readable
from converters.source import Place, Source
from converters.storage import open_files
from converters.zero.files import several_models
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.pipeline import lane_files, stages
from converters.zero.pipeline.lane_files import LaneFiles


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights of all stages, and the optimizer's state by the names of parameters.

    All files have to be there, with ``complete`` or without. ``CheckpointError`` for
    what is damaged or incomplete.
    """
    place = several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        lanes = lane_files.read(place, folder_files.scan(place))
        if len(lanes) == 1:
            return stages.read(place, lanes[0])
        return _merged(place, lanes)


def _merged(place: Place, lanes: Sequence[LaneFiles]) -> Source:
    """The pipelines of shards that all tensor-parallel ranks have, as one model."""
    # which other pipelines need not
    from converters.zero.parallel import merged_source, rules
    from converters.zero.parallel.cut_table import CutTable

    sources = [stages.read(place, lane) for lane in lanes]
    first_models = [next(iter(lane.models.values())) for lane in lanes]
    table = CutTable.of(first_models, rules.current())
    if not lanes[0].optimizers:
        # without ZeRO tied modules go by the number of their layer, as no pattern calls
        # them
        table = replace(table, info={}, entries={})

    first_states = [
        folder_files.read(next(iter(paths.values())))
        for lane in lanes
        for paths in lane.optimizers.values()
    ]
    one_save.require_same_progress(first_states)
    return merged_source.of_lanes(sources, table, PIPELINE)
