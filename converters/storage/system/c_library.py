"""Functions of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def function(name: str) -> Any | None:
    """The function,
    of which ``error`` tells why it failed; ``None`` where there is none."""
    if hasattr(ctypes, "windll"):  # Windows has no library without a name
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def error() -> OSError:
    """Why the last function of this thread failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
