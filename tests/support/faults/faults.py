"""Faults in the file operations of real processes, by an LD_PRELOAD library (``shim.c``).

A process started with ``environment(...)`` counts what it writes, syncs, renames and removes below
a folder; at one operation it is killed, or the operation fails as on a full or failing disk. A
forked process, which can no longer preload, is set by ``set_here`` if its parent preloaded.

    env = environment(out, at=17, do="enospc", rank=1, arm=arm)
    faulty worker: ... os.path.exists(arm)      # from here on operations count
    journal(log)                                # what the undisturbed process did
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kill = Literal["kill", "killgroup", "torn", "torngroup", "term", "stop", "stopgroup"]
Fault = Kill | Literal["enospc", "edquot", "eio", "erofs", "fsync", "eintr", "short"]
WRITES = "write", "writev", "pwrite", "pwritev", "sendfile", "copy_file_range", "truncate"
SOURCE = Path(__file__).with_name("shim.c")


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of a journal.

    ``number`` from 1 on, in that process; ``at`` in nanoseconds; ``call`` ends in ! where it was
    not let through; ``inode`` is 0 for an operation on a path.
    """

    number: int
    rank: str
    at: int
    call: str
    nbytes: int
    inode: int
    path: str


def library(source: Path = SOURCE) -> Path:
    """The compiled shim, made at its first use and kept in the temporary folder.

    ``RuntimeError`` with what the compiler said if there is none or it fails.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"ckpt-{source.stem}-{os.getuid()}-{digest}.so"
    if not path.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler; install gcc, as DeepSpeed needs it too")
        made = path.with_name(f"{path.name}.{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        made.replace(path)
    return path


def environment(
    root: Path,
    at: int = 0,
    do: Fault = "kill",
    *,
    rank: int | None = None,
    arm: Path | None = None,
    sticky: bool = False,
    log: Path | None = None,
    reads: int = 0,
) -> dict[str, str]:
    """Variables that make a process fail at its operation ``at`` below ``root``; 0 only counts.

    With ``rank``, only the process with that $RANK. With ``arm``, counting starts when the process
    opens or looks for that path. ``sticky`` errors stay. ``log`` receives the journal. With
    ``reads`` 1 reading counts, too, with 2 looking for files as well.
    """
    found = {
        "LD_PRELOAD": ":".join(filter(None, [str(library()), os.environ.get("LD_PRELOAD")])),
        "FAULT_ROOT": str(root.resolve()),
        "FAULT_AT": str(at),
        "FAULT_DO": do,
        "FAULT_STICKY": str(int(sticky)),
        "FAULT_READS": str(reads),
    }
    optional = {"FAULT_RANK": rank, "FAULT_ARM": arm, "FAULT_LOG": log}
    return found | {name: str(value) for name, value in optional.items() if value is not None}


def set_here(
    root: Path,
    at: int = 0,
    do: Fault = "kill",
    *,
    sticky: bool = False,
    log: Path | None = None,
    reads: int = 0,
    trace: Path | None = None,
) -> None:
    """Starts to count in this process, whose parent was started with the library preloaded.

    ``trace`` receives every change with its data (``hardening/crash/trace.py`` reads it).
    """
    here = _preloaded()
    here.fault_reads(reads)
    here.fault_trace(b"" if trace is None else os.fsencode(trace))
    journal_path = b"" if log is None else os.fsencode(log)
    rank = os.environ.get("RANK", "").encode()
    here.fault_set(os.fsencode(root), 1, at, do.encode(), int(sticky), rank, journal_path)


def count_here() -> int:
    """How many operations this process has counted."""
    return int(_preloaded().fault_count())


def stop_here() -> None:
    """Counts no longer in this process."""
    _preloaded().fault_set(b"/", 0, 0, b"", 0, b"", b"")
    _preloaded().fault_trace(b"")


def journal(log: Path) -> list[Operation]:
    """What was counted, in order; several ranks may write one journal."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        number, rank, at, call, nbytes, inode, path = line.split(" ", 6)
        found.append(Operation(int(number), rank, int(at), call, int(nbytes), int(inode), path))
    return found


def lose_power(root: Path, logs: Iterable[Path], zeros: bool) -> list[Path]:
    """Takes from the files below ``root`` what was written since their last fsync; which they were.

    ``logs`` are the journals of all that wrote there. As after a power failure under ext4, where
    renames and new names are on disk in their order and the data is not: such a file is empty or,
    with ``zeros``, has its length and zeros in it.
    """
    dirty: set[int] = set()
    operations = [each for log in logs for each in journal(log)]
    for each in sorted(operations, key=lambda each: each.at):
        if each.call == "fsync":
            dirty.discard(each.inode)
        elif each.inode and each.call.rstrip("!") in WRITES:
            dirty.add(each.inode)
    lost = []
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_ino in dirty:
            size = path.stat().st_size
            os.truncate(path, 0)
            os.truncate(path, size if zeros else 0)
            lost.append(path)
    return lost


def _preloaded() -> ctypes.CDLL:
    here = ctypes.CDLL(None)
    if not hasattr(here, "fault_set"):
        raise RuntimeError(f"this process runs without LD_PRELOAD={library()}")
    return here
