"""A small plain state that is captured now and written later."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.runs.digests import FileRecord, Progress, quiet
from ckpt.state import plain
from converters.storage import local


class PlainFile:
    """The bytes of ``plain.dumps(state)`` as a ``StateFile`` without storages.

    What is done to the state after this call is not written. ``CheckpointError`` names
    what is not a plain state; ``name`` is the file's, for that message.
    """

    storages: tuple[()] = ()

    def __init__(self, state: Any, name: str):
        self.data = plain.dumps(state, name)

    def size(self, path: Path) -> int:
        """The bytes of the file, whatever its ``path``."""
        return len(self.data)

    def end_of_storage(self, path: Path, index: int) -> int:
        """There is no storage: ``IndexError``."""
        raise IndexError(index)

    def replace(self, index: int, copy: memoryview) -> None:
        """There is no storage: ``IndexError``."""
        raise IndexError(index)

    def write(self, path: Path, progress: Progress = quiet) -> FileRecord:
        """Writes the file, whole or not at all, on disk when it returns."""
        local.write_file(path, self.data)
        progress(len(self.data))
        return FileRecord(len(self.data), f"sha256:{sha256(self.data).hexdigest()}")
