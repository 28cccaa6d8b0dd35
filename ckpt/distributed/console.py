"""The messages of ``ckpt`` in a training whose application has configured no logging.

Everything that is said goes to ``logging.getLogger("ckpt")``. Python shows warnings of a
logger that nobody handles and drops the rest; then a user would not see from which
checkpoint a training goes on. So this handler writes to stderr, one line each:

    ckpt: saved out/checkpoint-500 (98.0 GB) in 42 s; training waited 1.3 s

INFO on rank 0, warnings and errors on every rank. As soon as there is a handler of the
root logger or of "ckpt" (``logging.basicConfig``, pytest), it is silent, and the level
of the root logger counts, as for any other library; so does one that is set for "ckpt".
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from converters.errors import one_line


class _DefaultLevel(int):
    """INFO, until somebody sets a level."""


class Console(logging.Handler):
    """Writes "ckpt: MESSAGE" to stderr unless the application handles the message."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the message, on the ranks that it is for."""
        if _is_configured() or (record.levelno < logging.WARNING and _rank()):
            return

        try:
            line = f"ckpt: {self.format(record)}\n"

            # One call of write: torchrun starts ranks with "python -u", where print()
            # writes the text and the end of the line apart, and lines of two ranks
            # become one.
            sys.stderr.write(line)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def attach() -> logging.Logger:
    """The logger of ``ckpt``, with one ``Console``."""
    logger = logging.getLogger("ckpt")
    if not any(isinstance(handler, Console) for handler in logger.handlers):
        logger.addHandler(Console())
        logger.addFilter(_counts)
        logger.addFilter(_quoting)
    if logger.level == logging.NOTSET:
        logger.setLevel(_DefaultLevel(logging.INFO))
    return logger


def _counts(record: logging.LogRecord) -> bool:
    """Whether a message counts by the level of the application, where it has one."""
    is_own_level = isinstance(logging.getLogger("ckpt").level, _DefaultLevel)
    if not is_own_level or not _is_configured():
        return True
    return record.levelno >= logging.getLogger().level


def _quoting(record: logging.LogRecord) -> bool:
    """Makes the paths of a message ones that cannot break its line, for every handler."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            one_line(argument) if isinstance(argument, Path) else argument
            for argument in record.args
        )
    return True


def _is_configured() -> bool:
    """Whether the application handles what is logged."""
    logger, root = logging.getLogger("ckpt"), logging.getLogger()
    handlers = [*logger.handlers, *(root.handlers if logger.propagate else ())]
    silent = (Console, logging.NullHandler)
    return any(not isinstance(handler, silent) for handler in handlers)


def _rank() -> int:
    """This process among all ranks,
    before there is a process group by what its launcher says."""
    dist = sys.modules.get("torch.distributed")  # without torch there is one process
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    return int(os.environ.get("RANK") or 0)
