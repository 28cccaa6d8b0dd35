"""Requests that may be made twice, tried again after a bad moment.

The client waits and tries again by itself where it lists, announces, uploads and
downloads (``http_backoff``), but not where it looks a repository up, makes one, or
makes a branch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before the tries that follow
MAX_WAIT_SECONDS = 300.0  # seconds that an answer may ask to wait


def retry(request: Callable[[], T], pauses: Sequence[float] = WAITS) -> T:
    """What ``request`` returns, in the end; its last error if it never does."""
    for pause in pauses:
        try:
            return request()
        except Exception as error:
            if not is_transient(error):
                raise
            time.sleep(retry_after(error) or pause)

    return request()


def is_transient(error: BaseException) -> bool:
    """Whether an error may pass: a broken connection, 408, 429, or 500 and above."""
    import httpx2

    http_status = status(error)
    if http_status is None:
        return isinstance(error, httpx2.TransportError)

    return http_status in (408, 429) or http_status >= 500


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of the client carries, if it does."""
    response = getattr(error, "response", None)
    http_status = getattr(response, "status_code", None)
    return http_status if isinstance(http_status, int) else None


def retry_after(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait."""
    response = getattr(error, "response", None)
    answer = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(answer), MAX_WAIT_SECONDS) if answer.isdigit() else None
