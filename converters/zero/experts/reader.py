"""Experts' states as a ``Source``: rows of ``converters.detect``."""

from __future__ import annotations

from pathlib import Path

from converters.errors import readable
from converters.source import Source
from converters.storage import open_files
from converters.zero import reader
from converters.zero.checkpoint import ExpertsError
from converters.zero.files import several_models
from converters.zero.model_ranks import folder_files


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
    from converters.zero.experts import kinds  # which most checkpoints need not

    place = several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        files = folder_files.scan(place)
        return kinds.reader_of(place, files)(place, files)
