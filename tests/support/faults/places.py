"""Filesystems that lack something, by an LD_PRELOAD library (``places.c``, which lists what).

A process that was started with ``preload()`` in its environment lacks, below ``PLACE_ROOT``, what
``PLACE_LACKS`` names; both may change while it runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from faults import faults

SOURCE = Path(__file__).with_name("places.c")


def preload() -> dict[str, str]:
    """Variables for a process that is to have the library; it lacks nothing yet."""
    loaded = [str(faults.library(SOURCE)), os.environ.get("LD_PRELOAD")]
    return {"LD_PRELOAD": ":".join(filter(None, loaded))}


def wake_here() -> None:
    """In a process that was started with PLACE_ASLEEP: from now on ``lacking`` counts."""
    ctypes.CDLL(None).place_wake()


def lacking(
    root: Path,
    *what: str,
    error: str = "",
    late: int | None = None,
    match: str = "",
    log: Path | None = None,
) -> dict[str, str]:
    """Variables that say what ``root`` lacks; ``error`` names another errno for its refusals.

    ``late`` are the milliseconds until the size of a file is known. With ``match`` only files lack
    something whose paths have that in them.
    """
    found = {"PLACE_ROOT": str(root.resolve()), "PLACE_LACKS": ",".join(what), "PLACE_MATCH": match}
    if error:
        found["PLACE_ERRNO"] = str(getattr(errno, error))
    if late is not None:
        found["PLACE_LATE"] = str(late)
    if log is not None:
        found["PLACE_LOG"] = str(log)
    return found
