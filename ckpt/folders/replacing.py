"""A folder that gets another name: at once,
or file by file where folders cannot be renamed.

Object stores behind FUSE answer EXDEV, EPERM or ENOTSUP to a rename of a folder,
overlayfs EXDEV for a folder of a lower layer. There each file is moved by a rename of
its own (or copied, where even that is refused), and what makes the folder count comes
last:

    .NAME.saving/  everything but the records  ->  NAME/      synced
                   config.json, latest, manifest.json ...     the last of them is the commit

So NAME is whole or has no manifest at any moment, and until it is whole it has a file
``.arriving``, by which the same command finds what a crash left. What had the name
before goes the other way round, its manifest first.
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

from ckpt.folders.filenames import CONVERSION, MANIFEST, PINNED
from converters.storage import stores
from converters.storage.local_store import LOCAL, UNOFFERED

ARRIVING = ".arriving"  # in a folder that files are still being moved into
TRIAL = ".renaming-"  # how the folders of a trial are called
# What tells a reader that a folder is a checkpoint or a model, in the order in which it
# comes.
RECORDS = (
    *("config.json", "adapter_config.json", "*.index.json"),
    *("latest_universal", "latest", CONVERSION, MANIFEST),
)


def replace_folder(new_folder: Path, final_path: Path) -> None:
    """Moves ``new_folder`` to ``final_path`` durably.

    What has that name, a link too, goes to the trash. ``OSError`` if that fails, and
    then everything has its old name again.
    """
    trash = final_path.with_name(f".{final_path.name}.trash")
    undo_steps: list[Callable[[], object]] = []
    try:
        if not os.path.lexists(final_path):
            move(new_folder, final_path)
            undo_steps = [lambda: move(final_path, new_folder)]
        else:
            if (final_path / PINNED).exists():
                (new_folder / PINNED).touch()
            if _swap_folders(new_folder, final_path):
                undo_steps = [lambda: LOCAL.swap(new_folder, final_path)]
            else:
                _discard(trash)
                move(final_path, trash)
                undo_steps = [lambda: move(trash, final_path)]
                move(new_folder, final_path)
                undo_steps.insert(0, lambda: move(final_path, new_folder))

        LOCAL.sync(final_path.parent)
    except BaseException:
        for undo_step in undo_steps:
            undo_step()
        raise

    with suppress(OSError):  # what is left is recognisable by its name
        if os.path.lexists(new_folder):
            _discard(trash)
            if not renamed(new_folder, trash):
                _discard(new_folder)
        _discard(trash)


def move(source: Path, target: Path) -> None:
    """Gives a folder, file or link the name ``target``; ``OSError`` if it keeps its own."""
    if renamed(source, target):
        return

    if source.is_dir() and not source.is_symlink():
        _move_contents(source, target)
    else:
        _move_file(source, target)


def renamed(source: Path, target: Path) -> bool:
    """Whether a folder,
    or a link, has its new name; ``False`` if none can be renamed here.

    ``OSError`` for every other failure.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
        if error.errno in UNOFFERED and refusal(source.parent) is not None:
            return False
        raise

    return True


def is_arriving(folder: Path) -> bool:
    """Whether files are being moved into the folder, or were until a crash."""
    return (folder / ARRIVING).is_file() and not (folder / MANIFEST).exists()


def refusal(parent: Path) -> OSError | None:
    """The error of the filesystem for the rename of a folder in ``parent``; ``None`` if
    it does it.

    Tried with an empty one. Where none can be made, nothing is known, and ``None``
    returned.
    """
    trial = parent / f"{TRIAL}{uuid.uuid4().hex}"
    renamed_trial = trial.with_name(f"{trial.name}.moved")
    try:
        trial.mkdir()
    except OSError:
        return None

    try:
        os.rename(trial, renamed_trial)
    except OSError as error:
        return error if error.errno in (errno.EXDEV, *UNOFFERED) else None
    finally:
        for folder in (trial, renamed_trial):
            with suppress(OSError):
                folder.rmdir()

    return None


def _swap_folders(first_folder: Path, second_folder: Path) -> bool:
    """Whether two folders changed places at once; ``False`` where that is not offered."""
    try:
        return LOCAL.swap(first_folder, second_folder)
    except OSError as error:
        if error.errno in (errno.EXDEV, *UNOFFERED):
            return False
        raise


def _move_contents(source: Path, target: Path) -> None:
    """Moves a folder file by file; on an ``OSError`` what has been moved goes back.

    To a name that tools take for a checkpoint the records come last, from such a name
    they go first.
    """
    is_hiding = target.name.startswith(".")
    records, other_files = _contents(source)
    # what makes the folder count comes last where it is to count, and goes first where
    # it is not
    move_order = [*other_files, *records]
    if is_hiding:
        move_order = [*reversed(records), *other_files]

    deciding_record = records[-1] if records else None
    if MANIFEST in records:
        deciding_record = MANIFEST

    moved_names: list[str] = []
    try:
        _make_folders(source, target)
        (target / ARRIVING).touch()
        LOCAL.sync(target)
        for relative_path in move_order:
            if relative_path == deciding_record and not is_hiding:
                _sync_tree(target)  # before the record says that all is there
            _move_file(source / relative_path, target / relative_path)
            moved_names.append(relative_path)
            if relative_path == deciding_record and is_hiding:
                LOCAL.sync(source)  # before anything that it lists is gone

        _sync_tree(target)
        remove_empty(source)
        (target / ARRIVING).unlink()
        LOCAL.sync(target)
    except BaseException:
        with suppress(OSError):
            _make_folders(target, source)
        for relative_path in reversed(moved_names):
            with suppress(OSError):
                _move_file(target / relative_path, source / relative_path)

        with suppress(OSError):
            (target / ARRIVING).unlink()
        remove_empty(target)
        raise


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Records in their order, and all other files and links,
    by path relative to the folder."""
    relative_paths = []
    for parent, subfolders, filenames in os.walk(folder):
        linked_folders = [name for name in subfolders if os.path.islink(Path(parent, name))]
        relative_paths += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in (*filenames, *linked_folders)
        ]

    relative_paths = [name for name in relative_paths if name != ARRIVING]
    top_level = [name for name in relative_paths if "/" not in name]
    records = [name for pattern in RECORDS for name in top_level if fnmatchcase(name, pattern)]

    return records, sorted(set(relative_paths) - set(records))


def _make_folders(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for parent, subfolders, _ in os.walk(source):
        for name in subfolders:
            path = Path(parent, name)
            if not path.is_symlink():
                (target / path.relative_to(source)).mkdir(exist_ok=True)


def _move_file(source: Path, target: Path) -> None:
    """Moves a file or link by a rename or, where that is refused, as a copy."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, *UNOFFERED):
            raise

        if source.is_symlink():
            os.symlink(os.readlink(source), target)
        else:
            stores.copy_file(source, target)

        source.unlink()


def _sync_tree(folder: Path) -> None:
    for subfolder, _, _ in os.walk(folder, topdown=False):
        LOCAL.sync(Path(subfolder))


def remove_empty(folder: Path) -> None:
    """Removes the folders in a folder that have no files,
    and the folder itself if it has none."""
    for subfolder, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(subfolder)


def _discard(path: Path) -> None:
    """Removes a folder as far as it can be,
    or a link: Lightning's ``last.ckpt`` may be one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
