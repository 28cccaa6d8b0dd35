"""The source files that a thread holds open, the longest unused closed first."""

from __future__ import annotations

from collections.abc import Sequence

from converters.errors import CheckpointError
from converters.storage.open_files import FilePool
from converters.storage.store import fill_exactly, scatter_exactly
from converters.tensors import Extent


class SourceFiles:
    """Opens files when they are read, and again after they were closed."""

    def __init__(self) -> None:
        self.pool = FilePool()

    def fill(self, destination: memoryview, extent: Extent) -> None:
        """Reads an extent; ``CheckpointError`` if the file is shorter or cannot be read."""
        try:
            fill_exactly(self.pool.get(extent.path), extent.offset, destination)
        except OSError as error:
            raise CheckpointError(
                f"{extent.path} cannot be read: {error.strerror}", "incomplete"
            ) from error

    def scatter(self, destinations: Sequence[memoryview], extent: Extent) -> None:
        """Reads an extent into several destinations, one after another; see ``fill``."""
        try:
            scatter_exactly(self.pool.get(extent.path), extent.offset, destinations)
        except OSError as error:
            raise CheckpointError(
                f"{extent.path} cannot be read: {error.strerror}", "incomplete"
            ) from error

    def close(self) -> None:
        """Closes all of them."""
        self.pool.close()
