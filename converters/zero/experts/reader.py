"""Experts' states as a ``Source``: rows of ``converters.detect``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.accessors import is_whole_number
from converters.errors import readable
from converters.source import Place, Source
from converters.storage import open_files
from converters.zero import reader
from converters.zero.checkpoint import ExpertsError
from converters.zero.files import several_models

if TYPE_CHECKING:
    from converters.zero.model_ranks.folder_files import FolderFiles


@open_files.once()
def read_any(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """Reads files whose names tell of ZeRO alone:
    AutoEP under stage 3 has no others."""
    try:
        return reader.read(path, tag, complete)
    except ExpertsError:
        return read(path, tag, complete)


@open_files.once()
def read_lanes(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The same of several model-parallel ranks."""
    from converters.zero.parallel import (
        reader as parallel_reader,  # which most checkpoints need not
    )

    try:
        return parallel_reader.read(path, tag, complete)
    except ExpertsError:
        return read(path, tag, complete)


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights of the model with all experts, and the optimizer's state by name.

    All files have to be there, with ``complete`` or without. ``CheckpointError`` for
    what is damaged or incomplete.
    """
    # which most checkpoints need not
    from converters.zero.model_ranks import folder_files

    place = several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        files = folder_files.scan(place)
        return _reader_of(place, files)(place, files)


def _reader_of(place: Place, files: FolderFiles) -> Callable[[Place, FolderFiles], Source]:
    """The reader of experts that are dealt out as these are.

    ``CheckpointError`` if there is no model file.
    """
    # which most checkpoints need not
    from converters.zero.experts import (
        auto_ep,
        flat_groups,
        folded,
        folded_lanes,
        native_stages,
        sub_groups,
    )

    if files.partitioned:
        return folded.read if len(files.model_ranks) > 1 else sub_groups.read

    model = flat_groups.first_model(place, files)
    if isinstance(model.root.get(folded_lanes.KEY), dict):
        return folded.read

    saved_count = model.root.get("mp_world_size")
    if files.model_ranks == [0] and not (is_whole_number(saved_count) and saved_count > 1):
        return flat_groups.read
    # of AutoEP only ``folding`` says which rank has which experts: its reader asks for it
    return folded.read if model.root.get(auto_ep.KEY) else native_stages.read
