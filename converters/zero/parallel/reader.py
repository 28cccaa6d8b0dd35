"""The readers of states that more than ZeRO split up: rows of ``converters.detect``."""

from __future__ import annotations

from pathlib import Path

from converters.errors import consistent, unreadable
from converters.source import Source
from converters.storage import open_files
from converters.zero import reader
from converters.zero.checkpoint import ExpertsError
from converters.zero.files import several_models
from converters.zero.parallel import experts, folder_files, pipeline


@open_files.once()
def read_any(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The same of files whose names tell of ZeRO alone: AutoEP under stage 3 has no others."""
    try:
        return reader.read(path, tag, complete)
    except ExpertsError:
        return read(path, tag, complete)


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights, and the optimizer's state by the names of parameters.

    All files have to be there, with ``complete`` or without. ``CheckpointError`` for what
    is damaged or incomplete.
    """
    place = several_models.find(path, tag)
    try:
        with consistent(place.folder, "a file is damaged or of another save"):
            files = folder_files.scan(place)
            return pipeline.read(place, files) if files.layers else experts.read(place, files)
    except OSError as error:
        raise unreadable(error, place.folder) from error
