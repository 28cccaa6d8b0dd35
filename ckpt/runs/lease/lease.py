"""One job saves into a folder at a time: the lease that it takes when it starts.

    share = lease.acquire(folder)     refused while another job holds the folder
    share.require()                   at each commit: another has taken it over, if this job was
                                      stopped for long and looked dead
    share.release()

Within one process it is counted: several savers of one training share it. A thread
renews it, so that jobs on other machines see a sign of life. The lease of a job that
ended without releasing it is taken over: at once on its own machine, which knows the
process, elsewhere when no beat has come for ``watch.WATCH`` seconds. Clocks of different
machines are never compared.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt.runs.lease import lease_file, watch
from ckpt.runs.lease.lease_file import NAME, Holder, LeaseRecord
from ckpt.runs.lease.processes import Life
from converters.errors import CheckpointError
from converters.storage.system import processes

BEAT = 4.0  # seconds between signs of life
TRIES = 5  # looks at a file that is just being written
log = logging.getLogger("ckpt")

_guard = threading.RLock()  # whoever acquires
_grants: dict[str, _Grant] = {}  # by the real path of the folder
_dropped: deque[_Grant] = deque()  # of shares whose objects have ended
_renewal: threading.Thread | None = None


class Lease:
    """A share of this process's lease of a folder,
    until ``release`` or the object's end."""

    def __init__(self, grant: _Grant | None = None):
        self._grant, self._owner = grant, os.getpid()

    def require(self) -> None:
        """``CheckpointError`` naming the other job if one has taken the folder over."""
        if self._grant is not None:
            self._grant.require()

    @property
    def is_lost(self) -> bool:
        """Whether another job was seen to have taken the folder over."""
        return self._grant is not None and self._grant.loss is not None

    def release(self) -> None:
        """Gives the share up,
        and with the last one the lease; a second call does nothing."""
        grant, self._grant = self._grant, None
        if grant is not None and self._owner == os.getpid():
            grant.give_back()

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        """Makes a copy, or what is sent to another process, hold nothing."""
        return Lease, ()

    def __del__(self) -> None:
        """Waits for no lock: objects may end anywhere, even where one is held."""
        grant, self._grant = self._grant, None
        if grant is not None and self._owner == os.getpid():
            _dropped.append(grant)


class _Grant:
    """This process's lease of one folder. ``loss`` says why it is not that any more."""

    def __init__(self, key: str, folder: Path, holder: Holder):
        self.key, self.holder = key, holder
        self.folder, self.path = folder, folder / NAME
        self.shares, self.beats, self.lock = 0, 0, threading.RLock()
        self.seen = processes.boot_seconds()  # when the file was last seen to be ours
        self.loss: str | None = None

    def require(self) -> None:
        """Looks into the file; makes it again if somebody has removed it."""
        with self.lock:
            for attempt in range(TRIES):
                record = lease_file.read(self.path) if self.loss is None else None
                if self.loss is None and self._is_ours(record, attempt):
                    return
                if self.loss is not None:
                    raise CheckpointError(
                        f"{self.loss}; what this training saves is not committed; if "
                        "it is the one to go on, stop the other and start it again",
                        "output",
                    )

        raise CheckpointError(
            f"{self.path} changes all the time; see what writes it",
            "output",
        )

    @property
    def seen_lately(self) -> bool:
        """Whether nobody could have taken this process for dead since it last looked."""
        return processes.boot_seconds() - self.seen < watch.WATCH / 2

    def renew(self) -> None:
        """Gives a sign of life, and looks whether the file is still this process's."""
        with self.lock:
            if self.loss is None and self.shares:
                self.beats += 1
                self._is_ours(lease_file.renew(self.path, self.holder, self.beats), 0)
                if self.loss is not None:
                    log.warning(
                        "%s; what this training saves is not committed any more",
                        self.loss,
                    )

    def _is_ours(self, record: LeaseRecord | None, attempt: int) -> bool:
        """Whether the record is this process's;
        sets ``loss`` if another job has the folder."""
        if record is not None and _is_of(record, self.holder):
            self.seen = processes.boot_seconds()
            return True

        if record is not None and record.holder is not None:
            other_holder = record.holder
            self.loss = (
                f"another job ({other_holder}, started {other_holder.start}) has taken "
                f"over {self.folder}"
            )
        elif record is not None:  # just being written, or else cut short
            time.sleep(0.05)
            if attempt == TRIES - 2:
                lease_file.remove(self.folder, record)
        elif self.seen_lately:
            new_holder = lease_file.create(self.folder, self.holder)
            self.holder = new_holder or self.holder
            return new_holder is not None
        else:
            silent_seconds = processes.boot_seconds() - self.seen
            self.loss = (
                f"this training stood still for {silent_seconds:.0f} s, and its lease "
                f"of {self.folder} is gone, so another job may have saved there "
                "meanwhile"
            )

        return False

    def give_back(self) -> None:
        """Ends a share; with the last one the file goes."""
        with _guard, self.lock:
            self.shares -= 1
            if not self.shares:
                self.end()

    def end(self) -> None:
        """Removes the file, if it is still this process's."""
        self.shares = 0
        if _grants.get(self.key) is self:
            del _grants[self.key]
        with suppress(OSError):
            record = lease_file.read(self.path)
            if record is not None and _is_of(record, self.holder):
                self.path.unlink(missing_ok=True)


def acquire(folder: Path, beat: Callable[[], object] = lambda: None) -> Lease:
    """The lease of a folder,
    which is made if need be; waits up to ``watch.WATCH`` seconds.

    ``beat`` is called meanwhile. ``CheckpointError`` if another job holds the folder,
    or has taken it over from this process, or nothing can be written there.
    """
    with _guard, _folder_errors(folder):
        _collect_dropped()
        folder.mkdir(parents=True, exist_ok=True)
        real_path = os.path.realpath(folder)
        grant = _grants.get(real_path)
        if grant is None:
            grant = _take(real_path, folder, beat)
        else:
            grant.require()

        grant.shares += 1
        _keep_renewing()

        return Lease(grant)


def _take(real_path: str, folder: Path, beat: Callable[[], object]) -> _Grant:
    requested_holder, is_contended = Holder.current(), False
    while True:
        new_holder = lease_file.create(folder, requested_holder)
        if new_holder is not None and is_contended:
            # another starter may have been about to remove what was there before
            time.sleep(0.1)
            record = lease_file.read(folder / NAME)
            if record is None or not _is_of(record, new_holder):
                continue

        if new_holder is not None:
            _clear(folder)
            _grants[real_path] = grant = _Grant(real_path, folder, new_holder)
            return grant

        is_contended = True
        record = lease_file.read(folder / NAME)
        if record is not None:
            # the folder under another name
            if (own_grant := _own_grant(record)) is not None:
                return own_grant
            watch.await_end(folder, record, beat)
            # it may yet come to look
            heir = requested_holder if record.life() is Life.UNKNOWN else None
            if lease_file.remove(folder, record, heir) and record.holder is not None:
                log.info(
                    "%s: the lease of %s, which has ended, is taken",
                    folder,
                    record.holder,
                )


def _is_of(record: LeaseRecord, holder: Holder) -> bool:
    return record.holder is not None and record.holder.token == holder.token


def _own_grant(record: LeaseRecord) -> _Grant | None:
    return next((grant for grant in _grants.values() if _is_of(record, grant.holder)), None)


def _clear(folder: Path) -> None:
    """Removes what starters that were killed left on its way to the name."""
    for draft_path, record in lease_file.drafts(folder):
        if record.holder is not None and record.holder.process.life() is Life.ENDED:
            with suppress(OSError):
                draft_path.unlink(missing_ok=True)


def loss(folder: Path) -> str | None:
    """Why a folder is not this process's to change: another job has it,
    or may have had it."""
    grant = _grants.get(os.path.realpath(folder))
    if grant is None:
        holder = stranger(folder)
        return None if holder is None else f"another job ({holder}) saves there now"

    with suppress(CheckpointError):
        grant.require()

    return grant.loss


def stranger(folder: Path) -> Holder | None:
    """The other job that holds a folder, if one does; its life is not looked into."""
    record = lease_file.read(folder / NAME)
    if record is None or record.holder is None or _own_grant(record) is not None:
        return None
    return None if watch.is_this_process(record) else record.holder


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; a training keeps a small "
            "file in the folder that it saves into: make room, put the disk right, or "
            "name another folder",
            "output",
        ) from error


def _keep_renewing() -> None:
    global _renewal
    if _renewal is None or not _renewal.is_alive():
        _renewal = threading.Thread(target=_renew, name="ckpt-lease", daemon=True)
        _renewal.start()


def _renew() -> None:
    while True:
        time.sleep(BEAT)
        _collect_dropped()
        for grant in list(_grants.values()):
            try:
                grant.renew()
            except OSError:  # a disk that fails for a while; a commit says so
                continue
            except Exception:  # a bug, of which the other leases must not die
                log.exception("the lease of %s is not renewed; please report this", grant.folder)


def _collect_dropped() -> None:
    while True:
        try:
            grant = _dropped.popleft()
        except IndexError:  # not looked at first: another thread may take the last one
            return
        grant.give_back()


def release_all() -> None:
    """Gives all leases of this process up, at its end."""
    for grant in list(_grants.values()):
        with grant.lock:
            grant.end()


def _forget() -> None:
    """Forgets all leases in a forked child, which holds nothing."""
    global _guard, _renewal
    _guard, _renewal = threading.RLock(), None
    _grants.clear()
    _dropped.clear()


atexit.register(release_all)
processes.call_after_fork(_forget)


@contextmanager
def given_up_on_failure(lease: Lease) -> Iterator[None]:
    """Releases the lease if the block fails:
    a training that does not start holds nothing."""
    try:
        yield
    except BaseException:
        lease.release()
        raise
