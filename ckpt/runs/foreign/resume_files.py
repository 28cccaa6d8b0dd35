"""The files that a resume reads of a checkpoint without a manifest, whoever wrote it.

Beside them lie logs, temporary files, other tags, and what a node alone has: these say nothing
of whether two ranks see the same checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from converters.zero.files.discovery import is_tag_folder

# of DeepSpeed, the Trainer, Accelerate, Lightning and DCP: states, weights, indices, pointers
_NAMES = (
    *("*.pt", "*.pth", "*.pkl", "*.bin", "*.safetensors", "*.index.json", "*.ckpt", "*.swp"),
    *("*.distcp", ".metadata", "__*.metadata", "trainer_state.json", "extra_state_*"),
    *("latest", "latest_universal"),
)


def fingerprint(path: Path, tag: str | None = None) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files: the same for every rank that sees the same checkpoint.

    Of DeepSpeed's tags only ``tag`` counts, where there are several. For a file its own
    name and size.
    """
    if path.is_file():
        return ((path.name, path.stat().st_size),)

    files = []
    for file in _read_files(path, tag):
        try:
            files.append((file.relative_to(path).as_posix(), file.stat().st_size))
        except FileNotFoundError:
            continue  # it vanished while we looked

    return tuple(sorted(files))


def _read_files(path: Path, tag: str | None) -> Iterator[Path]:
    tags = {entry.name for entry in path.iterdir() if entry.is_dir() and is_tag_folder(entry)}
    left_out = tags - {tag} if tag in tags else set()
    for parent, folder_names, file_names in os.walk(path):
        if Path(parent) == path:
            # a save_dir: the runs of another program lie beside the tag, not states
            state_names = [name for name in folder_names if name in tags] if tags else folder_names
            folder_names[:] = [name for name in state_names if name not in left_out]
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        for name in file_names:
            if any(fnmatchcase(name, pattern) for pattern in _NAMES):
                yield Path(parent, name)
