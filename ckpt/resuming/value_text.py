"""Values as a table or a sentence shows them: short, and so that a difference is seen."""

from __future__ import annotations

from typing import Any

CELL = 24  # characters of a value in a table
LINE = 100  # and in a sentence
OTHER_FILES = "neither reads the files of the other: give it what it was saved with"


def file_form(sharding: str) -> str:
    """The form of the files that FSDP of either version, or another training, writes."""
    return sharding.rpartition(", ")[2]


def shown(value: Any, max_characters: int = LINE) -> str:
    """``value`` in at most ``max_characters``; a list of equal values as one of them."""
    if isinstance(value, list):
        all_equal = len(set(map(str, value))) == 1
        value = value[0] if all_equal else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."


def shown_pair(
    first_value: Any,
    second_value: Any,
    max_characters: int = LINE,
) -> tuple[str, str]:
    """Two values that differ; of long ones the part from a little before where they do."""
    first, second = (shown(value, 1 << 20) for value in (first_value, second_value))
    if max(len(first), len(second)) <= max_characters:
        return first, second

    pairs = zip(first, second, strict=False)
    differing = (index for index, (former, latter) in enumerate(pairs) if former != latter)
    position = next(differing, min(len(first), len(second)))
    start = max(0, position - max_characters // 3)
    begin = "..." if start else ""

    first_part, second_part = begin + first[start:], begin + second[start:]
    return shown(first_part, max_characters), shown(second_part, max_characters)
