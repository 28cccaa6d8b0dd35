"""JSON from files that others wrote: as strict as safetensors reads it, and bounded in memory.

``json`` takes the last of two equal names, NaN, and nests as deep as the stack; a header of 100 MB
becomes gigabytes of lists. So objects are counted before any is made.
"""

from __future__ import annotations

import json
from typing import Any

MOST_OBJECTS = 1 << 20  # lists and objects: three for each tensor of a header
MOST_VALUES = 1 << 22


def loads(data: bytes, text: str | None = None) -> Any:
    """The value in ``data``, which is UTF-8 unless ``text`` is what it decodes to.

    ``ValueError`` for anything else: names that stand twice, NaN, numbers over 4300 digits, more
    than ``MOST_OBJECTS`` lists and objects, or more than ``MOST_VALUES`` values.
    """
    objects, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    if objects > MOST_OBJECTS or values > MOST_VALUES:
        raise ValueError(f"{objects} lists and objects of {values} values: more than is read")
    try:
        return json.loads(
            data.decode() if text is None else text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
        )
    except RecursionError as error:
        raise ValueError("its lists nest too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
