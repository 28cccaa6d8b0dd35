"""A look at a path, at names and first bytes: no tensor, no pickle, no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from converters.detect import state_folders
from converters.detect.filenames import LATEST
from converters.lazy_pattern import LazyPattern
from converters.storage import first_bytes, misplaced_files, stores

_HEAD_BYTES = 512  # as far as the magic number of a tar archive


class Look:
    """A path that a user named, and perhaps a tag in it; each fact is looked up once.

    ``OSError`` for a folder that may not be looked into.
    """

    def __init__(self, path: Path, tag: str | None = None):
        self.path = path
        self.tag = tag

    @cached_property
    def is_folder(self) -> bool:
        """Whether a folder lies at the path, or a link to a folder."""
        return stores.is_folder(self.path)

    @cached_property
    def is_file(self) -> bool:
        """Whether a file lies at the path, or a link to a file."""
        return stores.is_file(self.path)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names in a folder, sorted; of anything else none."""
        return tuple(stores.names(self.path)) if self.is_folder else ()

    @cached_property
    def state_folder(self) -> Path | None:
        """The folder that DeepSpeed's files of the tag lie in, if the path leads to one."""
        if not self.is_folder:
            return None
        if self.tag is not None:
            folder = self.path / self.tag
            if stores.is_folder(folder):
                return folder
            return self.path if self.path.resolve().name == self.tag else None
        if state_folders.is_tag_folder(self.path):
            return self.path

        latest = self.path / LATEST
        tag = state_folders.tag_in(latest) if stores.is_file(latest) else None
        return self.path / tag if tag and stores.is_folder(self.path / tag) else None

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """The names in ``state_folder``, sorted."""
        folder = self.state_folder
        return tuple(stores.names(folder)) if folder else ()

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file; none of what cannot be read."""
        if not self.is_file:
            return b""
        with contextlib.suppress(OSError):
            return stores.head(self.path, _HEAD_BYTES)
        return b""

    def has(self, names: Iterable[str]) -> str | None:
        """The first of some names that a file in the folder has."""
        return next((name for name in names if stores.is_file(self.path / name)), None)

    def match(self, pattern: LazyPattern[str]) -> str | None:
        """The first name in the folder that fits."""
        return next((name for name in self.names if pattern.fullmatch(name)), None)

    @property
    def is_unfinished(self) -> bool:
        """Whether the path is a file that a download left before its end, by its name."""
        return self.is_file and self.path.name.lower().endswith(misplaced_files.UNFINISHED)

    @property
    def begins_as_torch_save(self) -> bool:
        """Whether the first record of a zip is a pickle,
        or the file is of before torch 1.6."""
        if self.head.startswith(b"PK\x03\x04"):
            return b"data.pkl" in self.head[30:300]
        return first_bytes.is_legacy_torch(self.head)
