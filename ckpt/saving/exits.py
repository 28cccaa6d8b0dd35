"""The end of the process: saves under way are finished, and a lost one shows in the exit code.

Handlers run in the reverse order of their registration, so the one that sets the code comes last of
ours. It ends the process there, as nothing else can set an exit code by then.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from ckpt.runs import lease  # whose handler is to run after those here

_flying: dict[Any, None] = {}  # in the order in which all ranks began
_failed: list[str] = []


def watch(saver: Any) -> None:
    """It has a save under way: at the end of the process, ``saver.drain`` is called."""
    _flying[saver] = None


def forget(saver: Any) -> None:
    """It has none."""
    _flying.pop(saver, None)


@atexit.register
def _code() -> None:
    if _failed:
        sys.stdout.flush()
        lease.release_all()
        os._exit(1)  # the only way to an exit code from here


@atexit.register
def _drain() -> None:
    for saver in list(_flying):
        try:
            saver.drain()
        except Exception as error:
            print(f"ckpt: {error}", file=sys.stderr, flush=True)
            _failed.append(str(error))
