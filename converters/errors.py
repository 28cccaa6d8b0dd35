"""The one exception a user sees, and the one that becomes it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

MAX_MESSAGE_LENGTH = 4000  # characters of a message

_FEW_FILES = "raise the limit of open files (ulimit -n 4096)"
_UNMAPPED = "failed to map segment"  # of a library, as the loader of Linux says it
_NO_ROOM = "make room there"
_SHORTAGES = {
    errno.EMFILE: _FEW_FILES,
    errno.ENFILE: _FEW_FILES,
    errno.ENOSPC: _NO_ROOM,
    getattr(errno, "EDQUOT", errno.ENOSPC): _NO_ROOM,  # not on Windows
}
Kind = Literal["absent", "corrupt", "incomplete", "refused", "unsupported", "output", "unloadable"]


class CheckpointError(Exception):
    """An error of a checkpoint: one line that says what is wrong, where,
    and what to do.

    ``kind`` says which sort of trouble it is: ``absent`` (nothing is at the path),
    ``corrupt`` (bytes are damaged or contradict each other), ``incomplete`` (something
    is missing), ``refused`` (the file asks for something that is never done, such as
    running code), ``unsupported`` (a known format that is not read here),
    ``unloadable`` (its reader would not load the result) and ``output`` (nothing is
    wrong with the checkpoint; the result cannot be written, or memory ran out).

    Functions for users name their arguments where commands name options
    (``converters.options``).
    """

    def __init__(self, message: str, kind: Kind = "corrupt"):
        line = " ".join(message.split())
        if len(line) > MAX_MESSAGE_LENGTH:
            line = f"{line[:MAX_MESSAGE_LENGTH]}... ({len(line)} characters)"

        # names come from files: none may move the cursor of the terminal it is printed
        # on
        super().__init__(one_line(line))
        self.kind: Kind = kind


def one_line(text: object) -> str:
    """A text in which no character moves the cursor, begins a line, or is no character.

    Names come from files and folders, and may be any bytes: those that are not UTF-8
    are lone surrogates. Each such character is written as Python writes it (``\\n``).
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in line
    )


def shortage(error: BaseException) -> str | None:
    """That the machine has run out of something, and what to do; ``None`` for other
    errors. How much memory was asked for is said where the error says it."""
    is_unmapped = isinstance(error, ImportError) and _UNMAPPED in str(error)
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if is_memory or is_unmapped:
        amount = f" ({one_line(error)})" if isinstance(error, MemoryError) and str(error) else ""
        return (
            f"memory ran out{amount}: end other programs, or raise the limit of this process "
            "(of ulimit, a container, or the batch system)"
        )
    if not isinstance(error, OSError) or error.errno not in _SHORTAGES:
        return None

    place = f"{one_line(error.filename)}: " if error.filename else ""
    return f"{place}{error.strerror}: {_SHORTAGES[error.errno]}"


def unreadable(error: OSError, path: Path) -> CheckpointError:
    """The error for what the system does not let be read:
    the file it names, or ``path``."""
    if (sentence := shortage(error)) is not None:
        return CheckpointError(sentence, "output")  # nothing is wrong with the checkpoint
    return CheckpointError(f"{error.filename or path}: {error.strerror}", "incomplete")


class MalformedError(Exception):
    """A value in a file cannot be interpreted; the message says which and why.

    For code that looks at a value and does not know the file that it is from. The
    reader, which knows, turns it into a ``CheckpointError``. No builtin exception is
    turned into one but around the single call that interprets (``int(text)``,
    ``json.loads``): a ``KeyError`` or ``ValueError`` of anything else is a bug of ours.
    """


@contextmanager
def consistent(folder: Path, otherwise: str) -> Iterator[None]:
    """Turns a ``MalformedError`` of this block into a ``CheckpointError`` about
    ``folder``; ``otherwise`` is the explanation appended to its message."""
    try:
        yield
    except MalformedError as error:
        raise CheckpointError(f"{folder} contradicts itself ({error}): {otherwise}") from error


@contextmanager
def readable(folder: Path, otherwise: str) -> Iterator[None]:
    """As ``consistent``; an ``OSError`` of this block becomes a ``CheckpointError``, too."""
    try:
        with consistent(folder, otherwise):
            yield
    except OSError as error:
        raise unreadable(error, folder) from error
