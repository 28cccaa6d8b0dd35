"""The file that says which job saves into a folder;
made, renewed and taken over as one may.

    out/_lease          JSON: a beat that counts up, a token, the process, since when
    out/_lease-TOKEN    on its way to or from that name

Its name begins as those do that the Hugging Face Trainer leaves out when it pushes a
folder to the Hub (transformers 5.23 ``trainer.py: push_to_hub``,
``ignore_patterns=["_*", ...]``). No arguments of the command are written into it: they
may hold secrets.

Whoever links it first has it: ``link(2)`` fails where the name is there already. The
beat is written in place, into the file that was opened and looked at, so that it never
lands in the file of another job that took the name meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.runs.lease.processes import Life, ProcessIdentity
from converters.accessors import entry, number
from converters.errors import MalformedError
from converters.storage.system import errnos, offsets, opening

NAME = "_lease"
_MAX_BYTES = 1 << 16  # bytes
_NO_LINKS = errnos.numbers(
    *("EPERM", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EXDEV", "EMLINK", "EACCES")
)
_ONLY_APPENDS = errnos.numbers("EINVAL", "EPERM", "EOPNOTSUPP", "ENOSYS", "ESPIPE")
_BEAT_OFFSET = len('{"beat": "')
_MAX_SHOWN = 60  # characters of a name


@dataclass(frozen=True, slots=True)
class Holder:
    """The job that holds a folder. ``since`` is in seconds since 1970, by its own clock.

    ``inode`` is that of the file it made: in a copy of the folder it is another.
    """

    token: str
    process: ProcessIdentity
    command: str
    since: float
    inode: int = 0

    @classmethod
    def current(cls) -> Holder:
        """This process, with a token of its own."""
        script = os.path.basename(sys.argv[0]) if sys.argv else ""
        command = f"python {script}".strip()
        return cls(uuid.uuid4().hex, ProcessIdentity.current(), command, time.time())

    def __str__(self) -> str:
        """The job for a reader: "host node7, pid 4242 (python train.py)"."""
        host, command = _plain(self.process.host), _plain(self.command)
        command_note = f" ({command})" if command else ""

        return f"host {host}, pid {self.process.pid}{command_note}"

    @property
    def start(self) -> str:
        """When the job began, for a reader: 13:05,
        with the date if that was another day."""
        try:
            start_time, today = time.localtime(self.since), time.localtime()
        except (OverflowError, ValueError, OSError):
            return "an unknown time"

        same_day = start_time[:3] == today[:3]
        return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", start_time)

    def dumps(self, beat: int = 0) -> bytes:
        """The file's contents; they have one length, whatever the beat."""
        facts = {"token": self.token, "command": self.command, "since": self.since}
        facts |= {"inode": self.inode, "process": self.process.facts()}
        return f'{{"beat": "{beat:012d}", {json.dumps(facts)[1:]}\n'.encode()


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The content of the file:
    ``holder`` is ``None`` if nobody could have written that.

    ``inode`` and ``changed`` (seconds, by the filesystem's clock) are those of the file.
    """

    data: bytes
    holder: Holder | None
    inode: int
    changed: float

    def is_of(self, other_record: LeaseRecord) -> bool:
        """Whether both are of the same lease."""
        if self.holder is None or other_record.holder is None:
            return self.data == other_record.data
        return self.holder.token == other_record.holder.token

    def life(self) -> Life:
        """Whether the holder lives. A copied folder has a copied lease,
        which does not tell."""
        if self.holder is None:
            return Life.UNKNOWN
        holder_life = self.holder.process.life()
        is_copied = self.inode != self.holder.inode
        return Life.UNKNOWN if is_copied and holder_life is not Life.ENDED else holder_life


def read(path: Path) -> LeaseRecord | None:
    """The lease at a path; ``None`` if there is none. ``OSError`` if it cannot be read."""
    try:
        fd = opening.descriptor(path, os.O_RDONLY | opening.NONBLOCK)
    except FileNotFoundError:
        return None

    with _closing(fd, path):
        return _read(fd)


def _read(fd: int) -> LeaseRecord:
    data = b""
    while len(data) < _MAX_BYTES and (block := offsets.read(fd, _MAX_BYTES, len(data))):
        data += block
    status = os.fstat(fd)
    return LeaseRecord(data, _holder(data), status.st_ino, status.st_mtime)


def _holder(data: bytes) -> Holder | None:
    """The job that the contents name; ``None`` if nobody could have written them."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return None

    try:
        process = ProcessIdentity.of(entry(facts, "process", dict))
        token, command = entry(facts, "token", str), entry(facts, "command", str)
        since, inode = number(facts, "since"), entry(facts, "inode", int)
    except MalformedError:
        return None

    return Holder(token, process, command, since, inode) if token else None


def create(folder: Path, holder: Holder) -> Holder | None:
    """Makes the lease of a folder,
    on disk; ``None`` if there is one. ``OSError`` if that fails.

    Returned is the holder with the file's inode.
    """
    lease_path, draft_path = folder / NAME, folder / f"{NAME}-{uuid.uuid4().hex}"
    try:
        linked_holder = _write(draft_path, holder)
        try:
            os.link(draft_path, lease_path)
        except FileExistsError:
            # over NFS the answer to a link that was made may get lost, and the link be
            # asked again
            return linked_holder if os.stat(draft_path).st_nlink == 2 else None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return linked_holder
    finally:
        with suppress(OSError):
            draft_path.unlink()

    try:
        return _write(lease_path, holder)
    except FileExistsError:
        return None


def _write(path: Path, holder: Holder) -> Holder:
    """Writes a file that must not exist yet."""
    fd = opening.descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    with _closing(fd, path):
        new_holder = replace(holder, inode=os.fstat(fd).st_ino)
        _put(fd, new_holder.dumps(), 0)
        with suppress(OSError):  # only for those who look after a power failure
            os.fsync(fd)

    return new_holder


def renew(path: Path, holder: Holder, beat: int) -> LeaseRecord | None:
    """Writes a beat,
    if the lease is still this holder's; returns what was there, if anything."""
    try:
        fd = opening.descriptor(path, os.O_RDWR | opening.NONBLOCK)
    except FileNotFoundError:
        return None

    with _closing(fd, path):
        found_record = _read(fd)
        if found_record.holder is not None and found_record.holder.token == holder.token:
            try:
                _put(fd, f"{beat:012d}".encode(), _BEAT_OFFSET)
            except OSError as error:
                if error.errno not in _ONLY_APPENDS:
                    raise
                os.ftruncate(fd, 0)
                _put(fd, holder.dumps(beat), 0)

        return found_record


def remove(folder: Path, record: LeaseRecord, heir: Holder | None = None) -> bool:
    """Removes a lease that was judged; ``False`` if another one is,
    or was, there by now.

    With ``heir`` its name is written into the file first, for a host that goes on to
    see the old file under the old name for a while, as NFS clients do.
    """
    lease_path, moved_path = folder / NAME, folder / f"{NAME}-{uuid.uuid4().hex}"
    present_record = read(lease_path)
    if present_record is None or not present_record.is_of(record):
        return False

    try:
        os.rename(lease_path, moved_path)
    except FileNotFoundError:
        return False

    moved_record = read(moved_path)
    if moved_record is not None and not moved_record.is_of(record):
        _put_back(moved_path, lease_path)
        return False

    with suppress(OSError):
        if heir is not None:
            moved_path.write_bytes(heir.dumps())

    moved_path.unlink(missing_ok=True)

    return True


def _put_back(moved_path: Path, lease_path: Path) -> None:
    """Gives a lease of another job, made between looking and renaming, its name back."""
    try:
        os.link(moved_path, lease_path)
    except FileExistsError:
        pass
    except OSError:
        if not lease_path.exists():
            os.rename(moved_path, lease_path)

    moved_path.unlink(missing_ok=True)


def clock(folder: Path) -> float:
    """The filesystem's time,
    by a file that is made and removed; seconds, as ``changed``."""
    probe_path = folder / f"{NAME}-{uuid.uuid4().hex}"
    fd = opening.descriptor(probe_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.write(fd, b"\n")
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        probe_path.unlink(missing_ok=True)


def drafts(folder: Path) -> Iterator[tuple[Path, LeaseRecord]]:
    """The files on their way to or from the name, which may be leftovers of a process
    that is gone."""
    for draft_path in sorted(folder.glob(f"{NAME}-*")):
        with suppress(OSError):
            if (record := read(draft_path)) is not None:
                yield draft_path, record


def _put(fd: int, data: bytes, offset: int) -> None:
    while data:
        written_count = offsets.write(fd, data, offset)
        data, offset = data[written_count:], offset + written_count


@contextmanager
def _closing(fd: int, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(fd)


def _plain(text: str) -> str:
    """Text of a file that anybody may have written, fit to be printed."""
    printable = [character if character.isprintable() else "?" for character in text]

    return "".join(printable)[:_MAX_SHOWN]
