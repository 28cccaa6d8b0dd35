"""A pipeline's states as a ``Source``: the row "deepspeed-pipeline" of ``converters.detect``."""

from __future__ import annotations

from pathlib import Path

from converters.errors import readable
from converters.source import Source
from converters.storage import open_files
from converters.zero.files import several_models
from converters.zero.model_ranks import folder_files
from converters.zero.pipeline import stages


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights of all stages, and the optimizer's state by the names of parameters.

    All files have to be there, with ``complete`` or without. ``CheckpointError`` for what
    is damaged or incomplete.
    """
    place = several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        return stages.read(place, folder_files.scan(place))
