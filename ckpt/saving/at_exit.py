"""The end of the process: saves under way are finished,
and a lost one shows in the exit code.

Handlers run in the reverse order of their registration, so the one that sets the code
comes last of ours. It ends the process there, as nothing else can set an exit code by
then.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import Any

from ckpt.runs.lease import lease  # whose handler is to run after those here

log = logging.getLogger("ckpt")

_savers_at_work: dict[Any, None] = {}  # in the order in which all ranks began
_failures: list[str] = []


def watch(saver: Any) -> None:
    """Has ``saver.drain`` called at the end of the process, as a save is under way."""
    _savers_at_work[saver] = None


def forget(saver: Any) -> None:
    """Takes ``watch`` back when the save is over."""
    _savers_at_work.pop(saver, None)


@atexit.register
def _set_exit_code() -> None:
    if _failures:
        sys.stdout.flush()
        lease.release_all()
        os._exit(1)  # the only way to an exit code from here


@atexit.register
def _drain_savers() -> None:
    for saver in list(_savers_at_work):
        try:
            saver.drain()
        except Exception as error:
            log.error("%s", error)
            _failures.append(str(error))
