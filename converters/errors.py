"""The one exception a user sees."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

MAX_MESSAGE_LENGTH = 4000  # characters of a message

# What interpreting bad bytes can raise. Not ``TypeError`` and ``AttributeError``: these are
# bugs of ours, and come out as they are; a value of a file is looked at before it is used.
MALFORMED = (ValueError, LookupError, ArithmeticError, RecursionError, struct.error)

Kind = Literal["corrupt", "incomplete", "refused", "unsupported", "output", "unloadable"]


class CheckpointError(Exception):
    """An error of a checkpoint: one line that says what is wrong, where, and what to
    do.

    ``kind`` says which sort of trouble it is: ``corrupt`` (bytes are damaged or
    contradict each other), ``incomplete`` (something is missing), ``refused`` (the file
    asks for something that is never done, such as running code), ``unsupported`` (a
    known format that is not read here), ``unloadable`` (its reader would not load the
    result) and ``output`` (nothing is wrong with the checkpoint; the result cannot be
    written).
    """

    def __init__(self, message: str, kind: Kind = "corrupt"):
        line = " ".join(message.split())
        if len(line) > MAX_MESSAGE_LENGTH:
            line = f"{line[:MAX_MESSAGE_LENGTH]}... ({len(line)} characters)"

        # names come from files: none may move the cursor of the terminal it is printed on
        super().__init__(
            "".join(
                character if character.isprintable() else ascii(character)[1:-1]
                for character in line
            )
        )

        self.kind: Kind = kind


@contextmanager
def consistent(folder: Path, otherwise: str) -> Iterator[None]:
    """What does not fit together inside a checkpoint, in this block, is a
    ``CheckpointError``; ``otherwise`` says what is the case then."""
    try:
        yield
    except MALFORMED as error:
        raise CheckpointError(f"{folder} contradicts itself ({error!r}): {otherwise}") from error
