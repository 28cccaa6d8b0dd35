"""Whether the job that holds a lease still lives: what its machine says, or its beat.

A machine knows its own processes. Of another machine's there is only the beat in the file: it
changes, or has not for so long that its job counts as ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ckpt.runs import lease_file
from ckpt.runs.lease_file import NAME, Record
from ckpt.runs.processes import Life, Process
from converters.errors import CheckpointError

WATCH = 25.0  # seconds without a beat, after which a job on another machine counts as ended
SILENT = 300.0  # seconds since the last one, by the filesystem's own clock, that ...
SHORT_WATCH = 9.0  # ... make so many enough; none would not do, as some let clients set their clock
GRACE = 2.0  # seconds for a job of this machine that is just ending
log = logging.getLogger("ckpt")


def await_end(folder: Path, record: Record, beat: Callable[[], object]) -> None:
    """Returns when the lease may be taken, or is another by now; raises if its holder lives."""
    begun, patience = time.monotonic(), WATCH
    noted = False
    while True:
        there = lease_file.read(folder / NAME)
        if there is None or not there.is_of(record):
            return
        life, waited = there.life(), time.monotonic() - begun
        if life is Life.ENDED or is_this_process(there):
            return
        if not noted and life is Life.UNKNOWN:
            noted, patience = True, _patience(folder, record)
            who = there.holder or "a job that left no name"
            words = "%s: waiting up to %.0f s for a sign of life of %s, which held it last"
            log.warning(words, folder, patience, who)
        signs = life is Life.UNKNOWN and there.data != record.data
        if signs or (life is Life.ALIVE and waited > GRACE):
            raise _in_use(folder, there)
        if waited > patience:
            if life is Life.UNKNOWN:
                return
            raise _in_use(folder, there)
        beat()
        time.sleep(0.1)


def _patience(folder: Path, record: Record) -> float:
    if record.holder is None:
        return SHORT_WATCH
    with suppress(OSError):  # a full disk
        if lease_file.clock(folder) - record.changed > SILENT:
            return SHORT_WATCH
    return WATCH


def _in_use(folder: Path, record: Record) -> CheckpointError:
    holder = record.holder
    who = f"{holder} has been saving there since {holder.start}" if holder else "by another job"
    return CheckpointError(f"{folder} is in use: {who}; stop it or name another folder", "output")


def is_this_process(record: Record) -> bool:
    """Whether this very process made it before it replaced itself by ``exec``."""
    holder = record.holder
    here = Process.current()
    return holder is not None and holder.process == here and record.inode == holder.inode


def describe(folder: Path) -> str | None:
    """Who saves into a folder right now, for a reader, as far as a look tells; ``None``: nobody."""
    with suppress(OSError):
        record = lease_file.read(folder / NAME)
        if record is None or record.holder is None or record.life() is Life.ENDED:
            return None
        since = f"{record.holder} has been saving there since {record.holder.start}"
        doubt = ", if it still lives, which only its machine knows"
        return since + (doubt if record.life() is Life.UNKNOWN else "")
    return None


def leftovers(folder: Path, quiet: float) -> Iterator[tuple[Path, Record]]:
    """Leases in a folder, and what was to become one, whose job has ended.

    Where that cannot be told: those that have not changed for ``quiet`` seconds.
    """
    with suppress(OSError):
        record = lease_file.read(folder / NAME)
        leases = [] if record is None else [(folder / NAME, record)]
        for path, record in (*leases, *lease_file.drafts(folder)):
            life = record.life()
            if path.name != NAME and record.holder is not None:
                life = record.holder.process.life()
            silent = time.time() - record.changed >= quiet
            if life is Life.ENDED or (life is Life.UNKNOWN and silent):
                yield path, record


def remove(path: Path, record: Record) -> None:
    """Removes one of the ``leftovers``, unless it is another job's by now."""
    if path.name == NAME:
        lease_file.remove(path.parent, record)
    else:
        path.unlink(missing_ok=True)
