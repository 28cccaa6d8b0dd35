"""Values as a table or a sentence shows them: short, and so that a difference is seen."""

from __future__ import annotations

from typing import Any

CELL = 24  # characters of a value in a table
LINE = 100  # and in a sentence


def shown(value: Any, most: int = LINE) -> str:
    """``value`` in at most ``most`` characters; a list of equal values as one of them."""
    if isinstance(value, list):
        same = len(set(map(str, value))) == 1
        value = value[0] if same else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def shown_pair(one: Any, other: Any, most: int = LINE) -> tuple[str, str]:
    """Two values that differ; of long ones the part from a little before where they do."""
    first, second = (shown(value, 1 << 20) for value in (one, other))
    if max(len(first), len(second)) <= most:
        return first, second
    pairs = zip(first, second, strict=False)
    at = next(
        (index for index, (a, b) in enumerate(pairs) if a != b), min(map(len, (first, second)))
    )
    start = max(0, at - most // 3)
    begin = "..." if start else ""
    return shown(begin + first[start:], most), shown(begin + second[start:], most)
