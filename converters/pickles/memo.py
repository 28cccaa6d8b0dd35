"""The memo of a pickle: which of its entries are asked for again."""

from __future__ import annotations

import re
import sys
from array import array

from converters.lazy_pattern import LazyPattern

SHORT_INDEXES = 256  # entries that BINGET can ask for, by one byte
MAX_SEARCHED_BYTES = 1 << 26  # what is longer is a file of tensors, whose pickles are short
_WINDOW_BYTES = 1 << 16
_LONG_GET = LazyPattern(rb"j(?=(....))", re.DOTALL)  # LONG_BINGET, or part of a name


def requested_entries(data: bytes) -> bytearray:
    """The memo's entries that a pickle may ask for:
    a byte each, 1 also for some it does not.

    Pickles put into the memo all that they build. What is not asked for need not stay in
    memory. There may be more entries than bytes here; of those nothing is known, nor of
    any where there is too much to search.
    """
    if len(data) > MAX_SEARCHED_BYTES:
        return bytearray()

    starts = range(0, len(data), _WINDOW_BYTES)  # the data may be a map of a file
    puts = sum(_puts(data[start : start + _WINDOW_BYTES]) for start in starts)
    requested = bytearray(min(len(data) // 2, puts))  # to put one takes two bytes
    requested[:SHORT_INDEXES] = bytes((1,)) * SHORT_INDEXES
    for start in starts:
        window = data[start : start + _WINDOW_BYTES + 4]  # with operands that go on behind it
        indexes = array("I", b"".join(_LONG_GET.findall(window)))
        if sys.byteorder == "big":
            indexes.byteswap()
        for index in set(indexes):
            if index < len(requested):
                requested[index] = 1

    return requested


def _puts(window: bytes) -> int:
    """How often something may be put into the memo there: these bytes are in names, too."""
    return window.count(b"\x94") + window.count(b"q") + window.count(b"r")
