"""The one exception a user sees, and the one that becomes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from converters.words import one_line

MAX_MESSAGE_LENGTH = 4000  # characters of a message

Kind = Literal["absent", "corrupt", "incomplete", "refused", "unsupported", "output", "unloadable"]


class CheckpointError(Exception):
    """An error of a checkpoint: one line that says what is wrong, where,
    and what to do.

    ``kind`` says which sort of trouble it is: ``absent`` (nothing is at the path),
    ``corrupt`` (bytes are damaged or contradict each other), ``incomplete`` (something
    is missing), ``refused`` (the file asks for something that is never done, such as
    running code), ``unsupported`` (a known format that is not read here),
    ``unloadable`` (its reader would not load the result) and ``output`` (nothing is
    wrong with the checkpoint; the result cannot be written).

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


def unreadable(error: OSError, path: Path) -> CheckpointError:
    """The error for what the system does not let be read:
    the file it names, or ``path``."""
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
