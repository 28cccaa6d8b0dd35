"""The one exception a user sees."""

from __future__ import annotations

from typing import Literal

Kind = Literal["corrupt", "incomplete", "refused", "unsupported", "output"]


class CheckpointError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    ``kind`` says which sort of trouble it is: ``corrupt`` (bytes are damaged or contradict each
    other), ``incomplete`` (something is missing), ``refused`` (the file asks for something that is
    never done, such as running code), ``unsupported`` (a known format that is not read here) and
    ``output`` (nothing is wrong with the checkpoint; the result cannot be written).
    """

    def __init__(self, message: str, kind: Kind = "corrupt"):
        super().__init__(" ".join(message.split()))
        self.kind: Kind = kind
