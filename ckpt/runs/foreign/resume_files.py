"""The files that a resume reads of a checkpoint without a manifest, whoever wrote it.

Beside them lie logs, temporary files, other tags, and what a node alone has: these say
nothing of whether two ranks see the same checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt.runs.foreign.dcp_files import FSDP_STEMS
from converters.zero.files.discovery import is_tag_folder

# of DeepSpeed, the Trainer, Accelerate, Lightning and DCP: states, weights, indices,
# pointers
_NAMES = (
    *("*.pt", "*.pth", "*.pkl", "*.bin", "*.safetensors", "*.index.json", "*.ckpt", "*.swp"),
    *("*.distcp", ".metadata", "__*.metadata", "trainer_state.json", "extra_state_*"),
    *("latest", "latest_universal"),
)
_ADAPTERS = ("adapter_model*",)


def fingerprint(path: Path, tag: str | None = None) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files:
    the same for every rank that sees the same checkpoint.

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
    """The files right in the folder, and in those folders that are of it: DeepSpeed's
    tag, or the parts of FSDP and PEFT's adapters."""
    tags = {entry.name for entry in path.iterdir() if entry.is_dir() and is_tag_folder(entry)}
    own_tags = {tag} if tag in tags else tags
    outer_tag = (tag or "").partition("/")[0]  # of several engines
    for entry in sorted(path.iterdir()):
        if not entry.is_dir():
            yield from _matching([entry], _NAMES)
        elif entry.name in own_tags or entry.name == outer_tag or entry.name.startswith(FSDP_STEMS):
            yield from _matching(_files_below(entry), _NAMES)
        elif not tags and not entry.name.startswith("."):
            yield from _matching(sorted(entry.iterdir()), _ADAPTERS)


def _matching(files: Iterable[Path], patterns: tuple[str, ...]) -> Iterator[Path]:
    for file in files:
        if any(fnmatchcase(file.name, pattern) for pattern in patterns):
            yield file


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folder_names, file_names in os.walk(folder):
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        yield from (Path(parent, name) for name in file_names)
