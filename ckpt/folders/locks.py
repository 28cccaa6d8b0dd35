"""Who reads a checkpoint right now: locks on its manifest, which end with the process.

    reader     shared flock on manifest.json, for as long as it reads
    deleter    exclusive flock on it, not waited for; whoever gets it is alone

The kernel drops the locks of a process that is killed, so that nothing stays locked by
the dead. Where the filesystem has no locks, nobody is seen and nobody is held up; where
the system has none (Windows), what deletes or commits says so and does nothing. A
manifest that is replaced is another file: ``slim`` locks the new one before it takes
the old one's place.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ckpt.folders.filenames import LOCK, MANIFEST
from converters.errors import CheckpointError
from converters.storage import local
from converters.storage.store import is_url
from converters.storage.system import flock, opening

PATIENCE = 10.0  # seconds a reader waits for a deleter; renames take milliseconds
_LOCKED_ERRNOS = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
_UNOFFERED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Lock:
    """A lock that is held until ``release``, the end of its ``with`` block,
    or of the object."""

    def __init__(self, fd: int | None = None):
        self.fd, self.owner = fd, os.getpid()

    def release(self) -> None:
        """Gives the lock up; a second call does nothing."""
        fd, self.fd = self.fd, None
        if fd is not None:
            # a forked child has the lock too, and must not end it
            if self.owner == os.getpid():
                with suppress(OSError):
                    flock.release(fd)
            os.close(fd)

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        """Makes a copy, or what is sent to another process, hold nothing."""
        return Lock, ()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def reading(folder: Path) -> Lock:
    """Keeps the checkpoint that ``folder`` is, or is the tag of, from being deleted.

    Holds nothing where there is no manifest, or no locks, as under a URL.
    ``CheckpointError`` if the checkpoint is being deleted.
    """
    if is_url(folder):
        return Lock()

    manifest_path = _manifest_of(folder)
    if manifest_path is None:
        return Lock()

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fd = opening.descriptor(manifest_path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise _deletion_error(folder) from error
            return Lock()

        lock = Lock(fd)
        try:
            flock.take(fd, shared=True)
            if _is_same_file(fd, manifest_path):
                return lock
        except OSError as error:
            if error.errno not in _LOCKED_ERRNOS:
                lock.release()
                return lock

        lock.release()
        if time.monotonic() > deadline:
            raise _deletion_error(folder)

        time.sleep(0.02)


def _deletion_error(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is being deleted or rewritten by another process; choose another checkpoint",
        "incomplete",
    )


def _manifest_of(folder: Path) -> Path | None:
    """The manifest of a checkpoint,
    from its folder or its tag's (which may hold a slash)."""
    absolute_path = Path(os.path.abspath(folder))
    for candidate in (absolute_path, *list(absolute_path.parents)[:2]):
        if (candidate / MANIFEST).is_file():
            return candidate / MANIFEST

    return None


def alone(folder: Path) -> Lock | None:
    """The exclusive lock of a checkpoint; ``None`` if somebody reads it.

    Without a manifest, or on a filesystem without locks, it holds nothing.
    ``CheckpointError`` where the system has none.
    """
    flock.require("changing a checkpoint")
    return exclusive(folder / MANIFEST)


def exclusive(locked_path: Path) -> Lock | None:
    """The exclusive lock of a file, not waited for;
    ``None`` if somebody else has a lock on it."""
    try:
        fd = opening.descriptor(locked_path, os.O_RDWR)  # NFS wants it writable
    except OSError:
        try:
            fd = opening.descriptor(locked_path)
        except OSError:
            return Lock()

    lock = Lock(fd)
    try:
        flock.take(fd)
    except OSError as error:
        lock.release()
        return None if error.errno in _LOCKED_ERRNOS else lock

    if _is_same_file(fd, locked_path):
        return lock

    lock.release()

    return None  # replaced while we looked: whoever did that is using it


def claimed(folder: Path) -> Lock:
    """Makes a staging folder, or empties one that was left, and holds its lock.

    ``CheckpointError`` if another process writes into it, or the system has no locks.
    """
    flock.require("saving into a run")
    folder.mkdir(parents=True, exist_ok=True)
    fd = opening.descriptor(folder / LOCK, os.O_RDWR | os.O_CREAT)
    lock = Lock(fd)
    try:
        flock.take(fd)
    except OSError as error:
        if error.errno in _LOCKED_ERRNOS:
            lock.release()
            raise CheckpointError(
                f"{folder} is in use: another process saves into {folder.parent}",
                "output",
            ) from error

        if error.errno not in _UNOFFERED:
            lock.release()
            raise

    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            try:
                shutil.rmtree(leftover)
            except OSError as error:
                # it names what is inside without its folders
                error.filename = str(leftover)
                raise
        elif leftover.name != LOCK:
            leftover.unlink()

    return lock


def _is_same_file(fd: int, locked_path: Path) -> bool:
    """Whether ``locked_path`` still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(locked_path))
    except OSError:
        return False


def in_use(folder: Path) -> bool:
    """Whether somebody reads the checkpoint right now, as far as can be told."""
    lock = exclusive(folder / MANIFEST)
    if lock is None:
        return True
    lock.release()
    return False


def replaced(path: Path, data: bytes) -> Lock:
    """Writes a file over another, durably;
    the lock of the new one, taken before it is there."""
    partial_path = path.with_name(f"{path.name}.partial")
    fd = opening.descriptor(partial_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    lock = Lock(fd)
    try:
        with suppress(OSError):  # no locks here
            flock.take(fd)
        with local.naming_path(partial_path):
            local.LocalWriter(fd).write(data, 0)
            local.sync(fd, partial_path)

        os.replace(partial_path, path)
        local.sync_folder(path.parent)
    except BaseException:
        lock.release()
        partial_path.unlink(missing_ok=True)
        raise

    return lock
