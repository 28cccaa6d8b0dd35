"""Which of the ways to deal experts out a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable

from converters.accessors import is_whole_number
from converters.source import Place, Source
from converters.zero.experts import (
    auto_ep,
    flat_groups,
    folded,
    folded_lanes,
    native_stages,
    sub_groups,
)
from converters.zero.model_ranks.folder_files import FolderFiles

Reader = Callable[[Place, FolderFiles], Source]


def reader_of(place: Place, files: FolderFiles) -> Reader:
    """What reads these files; ``CheckpointError`` if there is no model file."""
    if files.partitioned:
        return folded.read if len(files.model_ranks) > 1 else sub_groups.read

    model = flat_groups.first_model(place, files)
    if isinstance(model.root.get(folded_lanes.KEY), dict):
        return folded.read

    saved_count = model.root.get("mp_world_size")
    is_one = files.model_ranks == [0] and not (is_whole_number(saved_count) and saved_count > 1)
    if is_one:
        return flat_groups.read
    # of AutoEP only ``folding`` says which rank has which experts: its reader asks for it
    return folded.read if model.root.get(auto_ep.KEY) else native_stages.read
