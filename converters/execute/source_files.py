"""The source files that a thread reads: those that all threads share, and a few of its own,
of which the longest unused is closed first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.errors import CheckpointError
from converters.storage.open_files import FilePool, SharedFiles
from converters.storage.store import File, fill_exactly, scatter_exactly
from converters.tensors import Extent


class SourceFiles:
    """Files that a thread reads: those that all share, and a few of its own."""

    def __init__(self, shared: SharedFiles | None = None) -> None:
        self.shared = shared
        self.pool = FilePool()

    def fill(self, destination: memoryview, extent: Extent) -> None:
        """Reads an extent; ``CheckpointError`` if the file is shorter or cannot be read."""
        try:
            fill_exactly(self._file(extent.path), extent.offset, destination)
        except OSError as error:
            raise CheckpointError(
                f"{extent.path} cannot be read: {error.strerror}", "incomplete"
            ) from error

    def scatter(self, destinations: Sequence[memoryview], extent: Extent) -> None:
        """Reads an extent into several destinations, one after another; see ``fill``."""
        try:
            scatter_exactly(self._file(extent.path), extent.offset, destinations)
        except OSError as error:
            raise CheckpointError(
                f"{extent.path} cannot be read: {error.strerror}", "incomplete"
            ) from error

    def close(self) -> None:
        """Closes its own files."""
        self.pool.close()

    def _file(self, path: Path) -> File:
        file = self.shared.get(path) if self.shared is not None else None
        return file if file is not None else self.pool.get(path)
