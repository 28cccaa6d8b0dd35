"""The memo of a pickle: which of its entries are asked for again."""

from __future__ import annotations

import re


def requested_entries(data: bytes) -> bytearray:
    """The memo's entries that a pickle may ask for: a byte each, 1 also for some it
    does not.

    Pickles put into the memo all that they build. What is not asked for need not stay in
    memory.
    """
    requested = bytearray(len(data) // 2)  # to put one takes two bytes
    for match in re.finditer(rb"j(?=(....))", data, re.DOTALL):  # LONG_BINGET, or part of a name
        index = int.from_bytes(match[1], "little")
        if index < len(requested):
            requested[index] = 1

    return requested
