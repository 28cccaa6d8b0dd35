"""Public functions that have another name now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(function: Callable[P, R], old_name: str, new_name: str) -> Callable[P, R]:
    """The function under its old name: each call warns and names the new one."""

    @wraps(function)
    def deprecated(*args: P.args, **kwargs: P.kwargs) -> R:
        message = f"{old_name} is called {new_name} now; the old name goes in a later release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return deprecated
