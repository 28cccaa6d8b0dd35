"""Whether the job that holds a lease still lives: what its machine says, or its beat.

A machine knows its own processes. Of another machine's there is only the beat in the
file: it changes, or has not for so long that its job counts as ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ckpt.runs.lease import lease_file
from ckpt.runs.lease.lease_file import NAME, LeaseRecord
from ckpt.runs.lease.processes import Life, ProcessIdentity
from converters.errors import CheckpointError

# seconds without a beat, after which a job on another machine counts as ended
WATCH = 25.0
SILENT = 300.0  # seconds since the last one, by the filesystem's own clock, that ...
# ... make so many enough; none would not do, as some let clients set their clock
SHORT_WATCH = 9.0
GRACE = 2.0  # seconds for a job of this machine that is just ending
log = logging.getLogger("ckpt")


def await_end(folder: Path, record: LeaseRecord, beat: Callable[[], object]) -> None:
    """Returns when the lease may be taken,
    or is another by now; raises if its holder lives."""
    start_time, patience = time.monotonic(), WATCH
    is_announced = False
    while True:
        present_record = lease_file.read(folder / NAME)
        if present_record is None or not present_record.is_of(record):
            return

        holder_life = present_record.life()
        waited_seconds = time.monotonic() - start_time
        if holder_life is Life.ENDED or is_this_process(present_record):
            return

        if not is_announced and holder_life is Life.UNKNOWN:
            is_announced, patience = True, _patience(folder, record)
            holder_name = present_record.holder or "a job that left no name"
            message = "%s: waiting up to %.0f s for a sign of life of %s, which held it last"
            log.warning(message, folder, patience, holder_name)

        is_beating = holder_life is Life.UNKNOWN and present_record.data != record.data
        if is_beating or (holder_life is Life.ALIVE and waited_seconds > GRACE):
            raise _in_use(folder, present_record)
        if waited_seconds > patience:
            if holder_life is Life.UNKNOWN:
                return
            raise _in_use(folder, present_record)

        beat()
        time.sleep(0.1)


def _patience(folder: Path, record: LeaseRecord) -> float:
    if record.holder is None:
        return SHORT_WATCH
    with suppress(OSError):  # a full disk
        if lease_file.clock(folder) - record.changed > SILENT:
            return SHORT_WATCH

    return WATCH


def _in_use(folder: Path, record: LeaseRecord) -> CheckpointError:
    holder = record.holder
    occupant = (
        f"{holder} has been saving there since {holder.start}" if holder else "by another job"
    )
    return CheckpointError(
        f"{folder} is in use: {occupant}; stop it or name another folder", "output"
    )


def is_this_process(record: LeaseRecord) -> bool:
    """Whether this very process made the lease before it replaced itself by ``exec``."""
    holder = record.holder
    this_process = ProcessIdentity.current()
    if holder is None:
        return False

    return holder.process == this_process and record.inode == holder.inode


def describe(folder: Path) -> str | None:
    """Who saves into a folder right now, for a reader,
    as far as a look tells; ``None``: nobody."""
    with suppress(OSError):
        record = lease_file.read(folder / NAME)
        if record is None or record.holder is None or record.life() is Life.ENDED:
            return None
        since = f"{record.holder} has been saving there since {record.holder.start}"
        doubt = ", if it still lives, which only its machine knows"
        return since + (doubt if record.life() is Life.UNKNOWN else "")

    return None


def leftovers(folder: Path, quiet_seconds: float) -> Iterator[tuple[Path, LeaseRecord]]:
    """Leases in a folder, and what was to become one, whose job has ended.

    Where that cannot be told: those that have not changed for ``quiet_seconds`` seconds.
    """
    with suppress(OSError):
        record = lease_file.read(folder / NAME)
        leases = [] if record is None else [(folder / NAME, record)]
        for lease_path, record in (*leases, *lease_file.drafts(folder)):
            holder_life = record.life()
            if lease_path.name != NAME and record.holder is not None:
                holder_life = record.holder.process.life()
            is_silent = time.time() - record.changed >= quiet_seconds
            if holder_life is Life.ENDED or (holder_life is Life.UNKNOWN and is_silent):
                yield lease_path, record


def remove(lease_path: Path, record: LeaseRecord) -> None:
    """Removes one of the ``leftovers``, unless it is another job's by now."""
    if lease_path.name == NAME:
        lease_file.remove(lease_path.parent, record)
    else:
        lease_path.unlink(missing_ok=True)
