"""A folder that gets another name: at once, or file by file where folders cannot be renamed.

Object stores behind FUSE answer EXDEV, EPERM or ENOTSUP to a rename of a folder, overlayfs EXDEV
for a folder of a lower layer. There each file is moved by a rename of its own (or copied, where
even that is refused), and what makes the folder count comes last:

    .NAME.saving/  everything but the records  ->  NAME/      synced
                   config.json, latest, manifest.json ...     the last of them is the commit

So NAME is whole or has no manifest at any moment, and until it is whole it has a file
``.arriving``, by which the same command finds what a crash left. What had the name before goes the
other way round, its manifest first.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt.runs.manifest import NAME, PINNED
from converters import files

ARRIVING = ".arriving"  # in a folder that files are still being moved into
TRIAL = ".renaming-"  # how the folders of a trial are called
# What tells a reader that a folder is a checkpoint or a model, in the order in which it comes.
RECORDS = (
    *("config.json", "adapter_config.json", "*.index.json"),
    *("latest_universal", "latest", "conversion.json", NAME),
)


def replace_folder(new: Path, final: Path) -> None:
    """Moves ``new`` to ``final`` durably; what has that name, a link too, goes to the trash.

    ``OSError`` if that fails, and then everything has its old name again.
    """
    trash = final.with_name(f".{final.name}.trash")
    undo: list[Callable[[], object]] = []
    try:
        if not os.path.lexists(final):
            move(new, final)
            undo = [lambda: move(final, new)]
        else:
            if (final / PINNED).exists():
                (new / PINNED).touch()
            if _exchanged(new, final):
                undo = [lambda: files.exchange(new, final)]
            else:
                _discard(trash)
                move(final, trash)
                undo = [lambda: move(trash, final)]
                move(new, final)
                undo.insert(0, lambda: move(final, new))
        files.sync_folder(final.parent)
    except BaseException:
        for step in undo:
            step()
        raise
    with suppress(OSError):  # what is left is recognisable by its name
        if os.path.lexists(new):
            _discard(trash)
            if not renamed(new, trash):
                _discard(new)
        _discard(trash)


def move(source: Path, target: Path) -> None:
    """Gives a folder, file or link the name ``target``; ``OSError`` if it keeps its own."""
    if renamed(source, target):
        return
    if source.is_dir() and not source.is_symlink():
        _carry(source, target)
    else:
        _move_file(source, target)


def renamed(source: Path, target: Path) -> bool:
    """Whether a folder, or a link, has its new name; ``False`` if none can be renamed here.

    ``OSError`` for every other failure.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
        if error.errno in files.UNOFFERED and refusal(source.parent) is not None:
            return False
        raise
    return True


def is_arriving(folder: Path) -> bool:
    """Whether files are being moved into the folder, or were until a crash."""
    return (folder / ARRIVING).is_file() and not (folder / NAME).exists()


def refusal(place: Path) -> OSError | None:
    """What the filesystem answers to the rename of a folder in ``place``; ``None`` if it does it.

    Tried with an empty one. Where none can be made, nothing is known, and ``None`` returned.
    """
    trial = place / f"{TRIAL}{uuid.uuid4().hex}"
    moved = trial.with_name(f"{trial.name}.moved")
    try:
        trial.mkdir()
    except OSError:
        return None
    try:
        os.rename(trial, moved)
    except OSError as error:
        return error if error.errno in (errno.EXDEV, *files.UNOFFERED) else None
    finally:
        for folder in (trial, moved):
            with suppress(OSError):
                folder.rmdir()
    return None


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders changed places at once; ``False`` where that is not offered."""
    try:
        return files.exchange(one, other)
    except OSError as error:
        if error.errno in (errno.EXDEV, *files.UNOFFERED):
            return False
        raise


def _carry(source: Path, target: Path) -> None:
    """Moves a folder file by file; on an ``OSError`` what has been moved goes back.

    To a name that tools take for a checkpoint the records come last, from such a name they go
    first.
    """
    away = target.name.startswith(".")
    records, others = _contents(source)
    order = [*reversed(records), *others] if away else [*others, *records]
    ends = NAME if NAME in records else records[-1] if records else None
    moved: list[str] = []
    try:
        _make_folders(source, target)
        (target / ARRIVING).touch()
        files.sync_folder(target)
        for name in order:
            if name == ends and not away:
                _sync_tree(target)  # before the record says that all is there
            _move_file(source / name, target / name)
            moved.append(name)
            if name == ends and away:
                files.sync_folder(source)  # before anything that it lists is gone
        _sync_tree(target)
        remove_empty(source)
        (target / ARRIVING).unlink()
        files.sync_folder(target)
    except BaseException:
        with suppress(OSError):
            _make_folders(target, source)
        for name in reversed(moved):
            with suppress(OSError):
                _move_file(target / name, source / name)
        with suppress(OSError):
            (target / ARRIVING).unlink()
        remove_empty(target)
        raise


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Records in their order, and all other files and links, by path relative to the folder."""
    found = []
    for where, inner, names in os.walk(folder):
        links = [name for name in inner if os.path.islink(os.path.join(where, name))]
        found += [Path(where, name).relative_to(folder).as_posix() for name in (*names, *links)]
    found = [name for name in found if name != ARRIVING]
    records = [name for pattern in RECORDS for name in found if fnmatchcase(name, pattern)]
    records = [name for name in records if "/" not in name]
    return records, sorted(set(found) - set(records))


def _make_folders(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for where, inner, _ in os.walk(source):
        for name in inner:
            path = Path(where, name)
            if not path.is_symlink():
                (target / path.relative_to(source)).mkdir(exist_ok=True)


def _move_file(source: Path, target: Path) -> None:
    """One file or link, by a rename or, where that is refused, as a copy."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, *files.UNOFFERED):
            raise
        if source.is_symlink():
            os.symlink(os.readlink(source), target)
        else:
            files.copy_file(source, target)
        source.unlink()


def _sync_tree(folder: Path) -> None:
    for where, _, _ in os.walk(folder, topdown=False):
        files.sync_folder(Path(where))


def remove_empty(folder: Path) -> None:
    """Removes the folders in a folder that have no files, and the folder itself if it has none."""
    for where, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(where)


def _discard(path: Path) -> None:
    """Removes a folder as far as it can be, or a link: Lightning's ``last.ckpt`` may be one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
