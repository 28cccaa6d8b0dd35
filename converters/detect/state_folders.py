"""The folders that DeepSpeed's state files lie in, and what a user can name instead."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from converters.detect.filenames import EXPERTS, LATEST, STAGES, STATES
from converters.lazy_pattern import LazyPattern
from converters.options import TAG
from converters.storage import stores
from converters.storage.system.names import is_name

_STATES = LazyPattern(r".*_states\.pt.*", re.DOTALL)
NOTHING = "no checkpoint of DeepSpeed lies below it"


def is_state_file(name: str) -> bool:
    """Whether DeepSpeed gives this name to a file of a checkpoint."""
    return any(pattern.fullmatch(name) for pattern in STATES)


def is_tag_folder(path: Path) -> bool:
    """Whether state files lie directly in ``path``."""
    return any(map(is_state_file, stores.names(path)))


def has_parts(path: Path) -> bool:
    """Whether files of experts or layers lie directly in ``path``, with others or alone."""
    names = stores.names(path)
    return any(pattern.fullmatch(name) for name in names for pattern in (EXPERTS, STAGES))


def tag_in(latest: Path) -> str | None:
    """The tag that the file names; ``None`` if that can be no folder beside it."""
    try:
        tag_name = stores.head(latest, 4096).decode().strip()
    except UnicodeDecodeError:
        return None

    parts = Path(tag_name).parts
    can_exist = all(is_name(part) and len(part.encode()) < 256 for part in parts)

    return tag_name if parts and can_exist else None


def tags(root: Path) -> list[str]:
    """The names of the tag folders that lie directly in ``root``."""
    names = []
    for name in stores.folders(root):
        with contextlib.suppress(OSError):  # a folder that may not be looked into
            if is_tag_folder(root / name):
                names.append(name)

    return names


def checkpoints_below(path: Path) -> list[str]:
    """The names of the folders in ``path`` that have a file ``latest``."""
    return [name for name in _folders(path) if LATEST in _names(path / name)]


def tags_below(path: Path) -> list[str]:
    """The tag folders in ``path``,
    and in folders right below it, by their relative paths."""
    outer = _folders(path)
    inner = [f"{name}/{below}" for name in outer for below in _folders(path / name)]
    return sorted(
        name for name in (*outer, *inner) if any(map(_STATES.fullmatch, _names(path / name)))
    )


def _folders(path: Path) -> list[str]:
    """The folders in a folder; none where it may not be looked into.

    Hidden ones are what a save, a deletion or ``ckpt doctor`` put aside, and no
    checkpoints.
    """
    with contextlib.suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        return [name for name in stores.folders(path) if not name.startswith(".")]
    return []


def _names(path: Path) -> list[str]:
    """The names in a folder; none where it may not be looked into."""
    with contextlib.suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        return stores.names(path)
    return []


def offer(path: Path, has_option: bool = False) -> str:
    """The paths that the user can name instead of ``path``,
    as the second half of a sentence.

    ``has_option`` says that the command has an option ``--tag``, which not every one
    has.
    """
    if names := checkpoints_below(path):
        choice = "this folder" if len(names) == 1 else "one of these folders"
        return f"it holds the {_nouns('checkpoint', names)}: name {choice}"
    if names := tags_below(path):
        choice = f"name {'its folder' if len(names) == 1 else 'the folder of one'}, "
        choice += str(path / names[-1])
        if has_option:
            choice = f"choose {'it' if len(names) == 1 else 'one'} with {TAG}"
        return f"it holds the {_nouns('tag', names)}: {choice}"
    return NOTHING


def _nouns(noun: str, names: Sequence[str]) -> str:
    return f"{noun if len(names) == 1 else noun + 's'} {', '.join(names)}"
