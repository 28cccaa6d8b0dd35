"""Requests that may be made twice, tried again after a bad moment.

The client waits and tries again by itself where it lists, announces, uploads and downloads
(``http_backoff``), but not where it looks a repository up, makes one, or makes a branch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before the tries that follow
LONGEST = 300.0  # seconds that an answer may ask to wait


def patient(call: Callable[[], T], waits: Sequence[float] = WAITS) -> T:
    """What ``call`` returns, in the end; its last error if it never does."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            time.sleep(asked(error) or wait)
    return call()


def passing(error: BaseException) -> bool:
    """Whether it is a matter of time: a connection that broke, 408, 429, or 500 and above."""
    import httpx2

    number = status(error)
    if number is None:
        return isinstance(error, httpx2.TransportError)
    return number in (408, 429) or number >= 500


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of the client carries, if it does."""
    response = getattr(error, "response", None)
    found = getattr(response, "status_code", None)
    return found if isinstance(found, int) else None


def asked(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait."""
    response = getattr(error, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(text), LONGEST) if text.isdigit() else None
