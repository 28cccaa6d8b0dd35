"""The one exception a user sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

LONGEST = 4000  # characters of a message
Kind = Literal["corrupt", "incomplete", "refused", "unsupported", "output"]


class CheckpointError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    ``kind`` says which sort of trouble it is: ``corrupt`` (bytes are damaged or contradict each
    other), ``incomplete`` (something is missing), ``refused`` (the file asks for something that is
    never done, such as running code), ``unsupported`` (a known format that is not read here) and
    ``output`` (nothing is wrong with the checkpoint; the result cannot be written).
    """

    def __init__(self, message: str, kind: Kind = "corrupt"):
        line = " ".join(message.split())
        if len(line) > LONGEST:
            line = f"{line[:LONGEST]}... ({len(line)} characters)"
        # names come from files: none may move the cursor of the terminal it is printed on
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
        self.kind: Kind = kind


@contextmanager
def consistent(folder: Path, otherwise: str) -> Iterator[None]:
    """What does not fit together inside a checkpoint, in this block, is a ``CheckpointError``;
    ``otherwise`` says what is the case then."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder} contradicts itself ({error!r}): {otherwise}") from error
