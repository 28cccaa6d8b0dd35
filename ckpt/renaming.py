"""A folder put in the place of another at once, with the way back if that fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ckpt.runs.manifest import PINNED
from converters import files


def replace_folder(new: Path, final: Path) -> None:
    """Renames ``new`` to ``final`` durably; what has that name, a link too, goes to the trash.

    ``OSError`` if that fails, and then everything has its old name again.
    """
    trash = final.with_name(f".{final.name}.trash")
    undo: list[Callable[[], object]] = []
    try:
        if not os.path.lexists(final):
            os.rename(new, final)
            undo = [lambda: os.rename(final, new)]
        else:
            if (final / PINNED).exists():
                (new / PINNED).touch()
            if files.exchange(new, final):
                undo = [lambda: files.exchange(new, final)]
            else:
                _discard(trash)
                os.rename(final, trash)
                undo = [lambda: os.rename(trash, final)]
                os.rename(new, final)
                undo.insert(0, lambda: os.rename(final, new))
        files.sync_folder(final.parent)
    except OSError:
        for step in undo:
            step()
        raise
    with suppress(OSError):  # what is left is recognisable by its name
        if os.path.lexists(new):
            _discard(trash)
            os.rename(new, trash)
        _discard(trash)


def _discard(path: Path) -> None:
    """Removes a folder as far as it can be, or a link: Lightning's ``last.ckpt`` may be one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
