"""The folders that DeepSpeed's state files lie in, and what a user can name instead."""

from __future__ import annotations

import contextlib
from pathlib import Path

from converters.detect.filenames import LATEST, STATES
from converters.storage import local

NOTHING = "and no checkpoint of DeepSpeed lies below it"


def is_state_file(name: str) -> bool:
    """Whether DeepSpeed gives this name to a file of a checkpoint."""
    return any(pattern.fullmatch(name) for pattern in STATES)


def is_tag_folder(path: Path) -> bool:
    """Whether state files lie directly in ``path``."""
    return any(is_state_file(entry.name) for entry in path.iterdir())


def tag_in(latest: Path) -> str | None:
    """The tag that the file names; ``None`` if that can be no folder beside it."""
    with open(latest, "rb") as file, local.named(latest):
        data = file.read(4096)
    try:
        tag_name = data.decode().strip()
    except UnicodeDecodeError:
        return None

    parts = Path(tag_name).parts
    stays_below = ".." not in parts and not Path(tag_name).is_absolute()
    can_exist = "\0" not in tag_name and all(len(part.encode()) < 256 for part in parts)

    return tag_name if parts and stays_below and can_exist else None


def tags(root: Path) -> list[str]:
    """The names of the tag folders that lie directly in ``root``."""
    names = []
    for entry in sorted(root.iterdir()):
        with contextlib.suppress(OSError):  # a folder that may not be looked into
            if entry.is_dir() and is_tag_folder(entry):
                names.append(entry.name)

    return names


def checkpoints_below(path: Path) -> list[str]:
    """The names of the folders in ``path`` that have a file ``latest``."""
    return sorted(latest.parent.name for latest in path.glob(f"*/{LATEST}"))


def tags_below(path: Path) -> list[str]:
    """The tag folders in ``path``, and in folders right below it, by their relative paths."""
    return sorted(
        {
            state_file.parent.relative_to(path).as_posix()
            for pattern in ("*/*_states.pt*", "*/*/*_states.pt*")
            for state_file in path.glob(pattern)
        }
    )


def offer(path: Path) -> str:
    """What the user can name instead of ``path``, as the second half of a sentence."""
    if names := checkpoints_below(path):
        return f"it holds the checkpoints {', '.join(names)}: name one of these folders"
    if names := tags_below(path):
        return f"it holds the tags {', '.join(names)}: choose one with --tag"
    return NOTHING
