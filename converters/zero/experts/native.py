"""DeepSpeed's state files as a ``Source``, also those of ZeRO-3 with experts.

AutoEP writes no files of its own under ZeRO-3: what the files hold tells that experts are in them.
"""

from __future__ import annotations

from pathlib import Path

from converters.zero import reader
from converters.zero.checkpoint import Checkpoint, ExpertsError
from converters.zero.experts import reader as experts


def read(path: Path, tag: str | None = None, complete: bool = False) -> Checkpoint:
    """The weights, and the optimizer's state by the names of parameters; see ``zero.reader``."""
    try:
        return reader.read(path, tag, complete)
    except ExpertsError:
        return experts.read(path, tag, complete)
