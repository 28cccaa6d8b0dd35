"""A folder that is there whole or not at all, and work on it that can be continued.

.NAME.partial/    beside the output, while it is made
  plan.json         what is being made; another plan's leftovers are thrown away
  *.partial         a shard in the making
  model-...         shards that are whole; the same command goes on behind them
NAME/             the same folder, renamed when everything in it is whole; what it replaces changes
                  places with it at once, and goes by way of .NAME.trash
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckpt.renaming import is_arriving, replace_folder
from converters import files
from converters.errors import CheckpointError
from converters.plan import Plan

RECORD = "plan.json"


def folder_for(output: Path) -> Path:
    """Where the output is made until it is whole."""
    return output.with_name(f".{output.name}.partial")


def require_place(output: Path, keep: Sequence[Path], overwrite: bool) -> None:
    """Raises ``CheckpointError`` unless a folder may be made at ``output``; ``keep`` never may."""
    if not output.name:
        raise CheckpointError(f"{output} is no folder to make; name another with -o", "output")
    if output.resolve() in keep:
        raise CheckpointError(
            f"{output} holds the checkpoint itself; name another folder with -o", "output"
        )
    if output.is_symlink() or output.is_file() or os.path.ismount(output):
        raise CheckpointError(
            f"{output} is a file, a link or a mount point; name a new folder with -o", "output"
        )
    overwrite = overwrite or is_arriving(output)  # what a crash of this command left
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{output} exists already; --overwrite replaces it, -o names another folder", "output"
        )


@contextmanager
def told(output: Path) -> Iterator[None]:
    """What the system refuses while ``output`` is made, as ``CheckpointError``."""
    try:
        yield
    except OSError as error:
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise CheckpointError(
            f"{error.filename or output}: {error.strerror}; {room}choose another folder with -o",
            "output",
        ) from error


@contextmanager
def staged(output: Path, plan: Plan, nbytes: int) -> Iterator[Path]:
    """The folder to write into, which becomes ``output`` when the block ends without an error.

    It is locked, and empty or with whole shards of the same plan; ``nbytes`` in all will be needed.
    It stays behind only where the same command can go on: after an interruption or a failing disk,
    and with a whole shard in it. ``CheckpointError`` if it is in use or the disk too small.
    """
    folder = folder_for(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECORD, "a+b") as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder} is in use: another conversion writes {output}", "output"
            ) from error
        except OSError:
            pass  # a filesystem without locks
        try:
            digest = plan.digest().encode()
            record.seek(0)
            with files.named(folder / RECORD):
                same = record.read() == digest
            _clear(folder, {shard.filename for shard in plan.shards} if same else set())
            if not same:
                with files.named(folder / RECORD):
                    os.ftruncate(record.fileno(), 0)  # a file's own truncate ends at EINTR
                    record.write(digest)
                    record.flush()
            require_room(folder, nbytes, "choose another folder with -o")
            yield folder
            (folder / RECORD).unlink()
            files.sync_folder(folder)
            replace_folder(folder, output)
        except BaseException as error:
            unusable = isinstance(error, CheckpointError) and error.kind != "output"
            if unusable or not any((folder / shard.filename).exists() for shard in plan.shards):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _clear(folder: Path, shards: Collection[str]) -> None:
    """Removes all but these shards: what else an interrupted run left may be of any content."""
    for where, inner, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(where, name)
            if path.relative_to(folder).as_posix() not in (*shards, RECORD):
                path.unlink()
        for name in inner:
            path = Path(where, name)
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def require_room(folder: Path, nbytes: int, else_: str) -> None:
    """``CheckpointError`` unless ``nbytes`` fit on the disk, those that are in ``folder`` counted.

    ``else_`` says what to do where no room can be made.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = files.free_space(folder)
    if nbytes - there > free:
        raise CheckpointError(
            f"{folder.parent} has {free:,} bytes free, the output needs {nbytes - there:,}; "
            f"make room or {else_}",
            "output",
        )
