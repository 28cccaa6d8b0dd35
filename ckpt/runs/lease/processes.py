"""A process of some machine,
and whether it still lives: known exactly here, not at all from afar.

Equal boot id, pid namespace and host name: the same machine, whose ``/proc`` knows. A
pid alone is not enough, since pids are given out again; the start time, in clock ticks
since the machine's boot, tells two processes of one pid apart. Source: proc(5),
``/proc/PID/stat``, fields 3, 9 and 22.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from converters.accessors import entry
from converters.errors import MalformedError

_EXITING = 0x4  # PF_EXITING of the kernel's include/linux/sched.h


class Life(Enum):
    """The known facts of a process."""

    ALIVE = "alive"
    EXITING = "exiting"  # killed, say, and giving back its memory, which takes seconds
    ENDED = "ended"
    UNKNOWN = "unknown"  # of another machine, or another user's in a /proc that hides it


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process: ``host`` and ``machine`` (boot id
    and pid namespace) it runs on, ``pid`` there.

    ``start`` is in clock ticks since the machine's boot; 0 where no ``/proc`` tells.
    """

    host: str
    machine: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        stat = _stat("self")
        return cls(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            stat.start if stat else 0,
        )

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ProcessIdentity:
        """The process that ``facts`` made; ``MalformedError`` for anything else."""
        host, machine = entry(facts, "host", str), entry(facts, "machine", str)
        pid, start = entry(facts, "pid", int), entry(facts, "start", int)
        if not 0 < pid < 1 << 31:
            raise MalformedError(f"the pid is {pid}")

        return cls(host, machine, pid, start)

    def facts(self) -> dict[str, Any]:
        """The process as plain data."""
        return asdict(self)

    def life(self) -> Life:
        """Whether the process lives; ``UNKNOWN`` on another machine."""
        this_process = ProcessIdentity.current()
        if not this_process.machine or (self.host, self.machine) != (
            this_process.host,
            this_process.machine,
        ):
            return Life.UNKNOWN

        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return Life.ENDED
        except PermissionError:
            pass  # another user's

        stat = _stat(str(self.pid))
        if stat is None or not self.start:
            return Life.UNKNOWN
        if stat.start != self.start or stat.state in "ZX":
            return Life.ENDED

        return Life.EXITING if stat.flags & _EXITING else Life.ALIVE


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    flags: int
    start: int


def _stat(pid: str) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # a name may hold spaces and brackets
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None

    are_numbers = len(fields) > 19 and fields[6].isdecimal() and fields[19].isdecimal()
    return _Stat(fields[0], int(fields[6]), int(fields[19])) if are_numbers else None


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8", errors="replace") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        # as under gVisor; the host's name alone is the same in the next container too
        return ""
