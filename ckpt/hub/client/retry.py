"""Requests that may be made twice, tried again after a bad moment.

The client waits and tries again by itself where it lists, announces, uploads and
downloads (``http_backoff``), but not where it looks a repository up, makes one, or
makes a branch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
_CONNECTION_ERRORS = {
    "httpx2": ("TransportError",),
    "httpx": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
}
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before the tries that follow
MAX_WAIT_SECONDS = 300.0  # seconds that an answer may ask to wait


def retry(request: Callable[[], T], pauses: Sequence[float] = WAITS) -> T:
    """Returns what ``request`` returns,
    in the end; raises its last error if it never does."""
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
    http_status = status(error)
    if http_status is None:
        return isinstance(error, connection_errors())

    return http_status in (408, 429) or http_status >= 500


def connection_errors() -> tuple[type[Exception], ...]:
    """The classes of connections that broke,
    whichever library the client asks the Hub with.

    huggingface_hub 0 has requests, 1 httpx, 2 httpx2; none is imported here.
    """
    return tuple(
        error_class
        for module_name, class_names in _CONNECTION_ERRORS.items()
        if (module := sys.modules.get(module_name)) is not None
        for class_name in class_names
        if (error_class := getattr(module, class_name, None)) is not None
    )


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
