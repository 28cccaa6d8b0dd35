"""Processes of this machine: their clock, their children, their priority."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress


def boot_seconds() -> float:
    """Seconds that go on while the machine sleeps."""
    if sys.platform == "win32" or not hasattr(time, "clock_gettime"):
        return time.monotonic()
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def call_after_fork(function: Callable[[], object]) -> None:
    """Has a forked child call the function first; elsewhere no process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def lower_priority(pid: int, nice: int) -> None:
    """Lets a process yield to others, where that can be asked; it may be over already."""
    if sys.platform != "win32":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, nice)
