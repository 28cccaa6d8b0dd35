"""The manifest of an adopted checkpoint, written after its files are durable."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ckpt.folders import filenames
from ckpt.runs.manifest import Manifest
from converters.errors import CheckpointError
from converters.storage import local


def require_place(folder: Path, manifest: Manifest) -> None:
    """``CheckpointError`` where ``write`` could not write the manifest; writes nothing."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, "the folder may not be written to")
    if local.free_space(folder) < len(manifest.dumps()):
        raise _unwritable(folder, "no space is left on its disk")


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, durably, after the files that it lists.

    ``CheckpointError`` if it cannot be written.
    """
    try:
        _sync(folder, manifest.files)
        local.write_file(folder / filenames.MANIFEST, manifest.dumps())
        local.sync_folder(folder)
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error


def _unwritable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder} gets no manifest.json: {reason}", "output")


def _sync(folder: Path, names: Iterable[str]) -> None:
    """Makes files durable that were written without an fsync."""
    for file_name in names:
        local.sync_file(folder / file_name)
    for subfolder, _, _ in os.walk(folder):
        local.sync_folder(Path(subfolder))
