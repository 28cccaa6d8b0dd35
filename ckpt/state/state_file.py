"""A file of states that is captured now and written later, whatever its form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ckpt.runs.digests import FileRecord, Progress, quiet


class StateFile(Protocol):
    """The methods that a save asks of a file:
    of ``torch.save`` (``torch_file``), of DCP (``distcp_file``)."""

    @property
    def storages(self) -> Sequence[Any]:
        """The bytes that copies may be made of, in the order of the file."""

    def size(self, path: Path) -> int:
        """The exact size of the file at ``path``."""

    def end_of_storage(self, path: Path, index: int) -> int:
        """Where the bytes of a storage end in the file."""

    def replace(self, index: int, copy: memoryview) -> None:
        """Takes the bytes of a storage from ``copy``."""

    def write(self, path: Path, progress: Progress = quiet) -> FileRecord:
        """Writes the file, on disk when it returns."""
