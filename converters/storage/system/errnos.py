"""Numbers of errors by name: not every system has them all."""

from __future__ import annotations

import errno


def numbers(*names: str) -> tuple[int, ...]:
    """The numbers of those of the names ("EIO", "EREMOTEIO") that this system has."""
    return tuple(number for name in names if isinstance(number := getattr(errno, name, None), int))
