"""Paths that this process may not look into, as another user's folder: root itself, which tests
may run as, may look into all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CALLS = ("stat", "lstat", "scandir", "listdir", "open")


def close(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Makes a file unreadable, or a folder one that cannot be listed nor entered."""
    closed = os.fspath(path)
    for name in _CALLS:
        monkeypatch.setattr(os, name, _refusing(getattr(os, name), name, closed))
    access = os.access

    def refused_access(place: Any, *arguments: Any, **options: Any) -> bool:
        return not _is_closed(place, "open", closed) and access(place, *arguments, **options)

    monkeypatch.setattr(os, "access", refused_access)


def _refusing(call: Callable[..., Any], name: str, closed: str) -> Callable[..., Any]:
    def called(place: Any = ".", *arguments: Any, **options: Any) -> Any:
        if _is_closed(place, name, closed):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
        return call(place, *arguments, **options)

    return called


def _is_closed(place: Any, name: str, closed: str) -> bool:
    """What is in a closed folder cannot even be looked at; the path itself can."""
    if isinstance(place, int):
        return False
    text = os.fsdecode(place)
    is_itself = text == closed and name not in ("stat", "lstat")
    return is_itself or text.startswith(closed + os.sep)
