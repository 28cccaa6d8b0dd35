"""Regular expressions out of a file, matched in bounded time.

``re`` takes exponential time for patterns such as ``(a+)+b``, and a configuration is a
file that anybody may have written. Here a pattern is a function from the positions in a
name where a match may begin to those where it may end, so each position is looked at
once, however it was reached. ``re``'s own parser reads the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from converters.errors import CheckpointError, MalformedError

try:  # Python 3.10 has them as modules of their own
    import re._constants as constants  # type: ignore[import-not-found, unused-ignore]
    import re._parser as parser  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import sre_constants as constants
    import sre_parse as parser

MAX_LENGTH = 4096  # characters of a pattern, and of a name
MAX_DEPTH = 2  # repetitions inside repetitions, lookaheads count
MAX_REPEATS = 256  # of a counted repetition
_SPECIAL = frozenset("\\^$*+?{}[]|()")
Positions = frozenset[int]


def ends_with(pattern: str, name: str) -> bool:
    """Whether ``(.*\\.)?(pattern)$`` matches:
    PEFT's way to look a module up in its patterns."""
    if not _SPECIAL.isdisjoint(pattern):
        return matches(f"(.*\\.)?({pattern})", name)

    # a plain name, as nearly all are, in which a dot is any character
    start = len(name) - len(pattern)
    is_ending = start == 0 or (start > 0 and name[start - 1] == ".")
    return is_ending and all(
        expected in (character, ".") and character != "\n"
        for expected, character in zip(pattern, name[start:], strict=True)
    )


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches the whole name;
    ``CheckpointError`` for one that is not read."""
    if len(name) > MAX_LENGTH:
        raise CheckpointError(f"a name has {len(name)} characters, expected at most {MAX_LENGTH}")
    return len(name) in _ends(_parsed(pattern), name, frozenset({0}))


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    if len(pattern) > MAX_LENGTH:
        reason = f"it has {len(pattern)} characters, expected at most {MAX_LENGTH}"
        raise _unread(pattern, reason)

    try:
        sequence = parser.parse(pattern)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise _unread(pattern, str(error)) from error

    try:
        _require_readable(sequence, 0)
    except MalformedError as error:
        raise _unread(pattern, str(error)) from error

    return sequence


def _unread(pattern: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the pattern {pattern[:200]!r} is not read: {reason}", "unsupported")


def _require_readable(sequence: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise MalformedError("its repetitions nest too deep")

    for operator, argument in sequence:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            min_repeats, max_repeats, inner = argument
            if min_repeats > MAX_REPEATS or (
                max_repeats is not constants.MAXREPEAT and max_repeats > MAX_REPEATS
            ):
                raise MalformedError(f"it repeats over {MAX_REPEATS} times")
            _require_readable(inner, depth + (max_repeats not in (0, 1)))
        elif name == "BRANCH":
            for inner in argument[1]:
                _require_readable(inner, depth)
        elif name == "SUBPATTERN":
            if argument[1] or argument[2]:
                raise MalformedError("it changes flags")
            _require_readable(argument[3], depth)
        elif name in ("ASSERT", "ASSERT_NOT"):
            if argument[0] < 0:
                raise MalformedError("it looks behind")
            _require_readable(argument[1], depth + 1)
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            raise MalformedError(f"{name.lower()} is not supported")


def _ends(sequence: Any, text: str, starts: Positions) -> Positions:
    """The positions where a match
    of the parsed sequence may end that begins in ``starts``."""
    for operator, argument in sequence:
        if not starts:
            break
        starts = _step(str(operator), argument, text, starts)
    return starts


def _step(operator: str, argument: Any, text: str, starts: Positions) -> Positions:
    if operator in ("MAX_REPEAT", "MIN_REPEAT"):
        min_repeats, max_repeats, inner = argument
        return _repeated(min_repeats, max_repeats, inner, text, starts)
    if operator == "BRANCH":
        return frozenset().union(*(_ends(inner, text, starts) for inner in argument[1]))
    if operator == "SUBPATTERN":
        return _ends(argument[3], text, starts)
    if operator in ("ASSERT", "ASSERT_NOT"):
        positive = operator == "ASSERT"
        return frozenset(
            position
            for position in starts
            if bool(_ends(argument[1], text, frozenset({position}))) is positive
        )
    if operator == "AT":
        return frozenset(
            position for position in starts if _anchored(str(argument), text, position)
        )

    return frozenset(
        position + 1
        for position in starts
        if position < len(text) and _matches_character(operator, argument, text[position])
    )


def _repeated(
    min_repeats: int, max_repeats: int, inner: Any, text: str, starts: Positions
) -> Positions:
    for _ in range(min_repeats):
        starts = _ends(inner, text, starts)

    ends, fresh, count = starts, starts, min_repeats
    while fresh and count < max_repeats:
        fresh = _ends(inner, text, fresh) - ends
        ends |= fresh
        count += 1

    return ends


def _anchored(anchor: str, text: str, position: int) -> bool:
    if anchor in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return position == 0
    if anchor in ("AT_END", "AT_END_STRING"):
        return position == len(text)

    before, after = (_is_word_character(text, n) for n in (position - 1, position))
    boundary = before is not after
    return boundary if anchor == "AT_BOUNDARY" else not boundary


def _is_word_character(text: str, position: int) -> bool:
    if not 0 <= position < len(text):
        return False
    return text[position].isalnum() or text[position] == "_"


def _matches_character(operator: str, argument: Any, character: str) -> bool:
    if operator == "ANY":
        return character != "\n"
    if operator == "LITERAL":
        return bool(ord(character) == argument)
    if operator == "NOT_LITERAL":
        return bool(ord(character) != argument)
    return _in_class(argument, character)


def _in_class(items: Iterable[tuple[Any, Any]], character: str) -> bool:
    negated, member = False, False
    for operator, argument in items:
        kind = str(operator)
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            member = member or ord(character) == argument
        elif kind == "RANGE":
            member = member or argument[0] <= ord(character) <= argument[1]
        else:
            member = member or _in_category(str(argument), character)

    return member is not negated


def _in_category(category: str, character: str) -> bool:
    kind = category.removeprefix("CATEGORY_")
    inverse = kind.startswith("NOT_")
    kind = kind.removeprefix("NOT_")
    if kind == "DIGIT":
        member = character.isdecimal()
    elif kind == "SPACE":
        member = character.isspace()
    else:
        member = character.isalnum() or character == "_"

    return member is not inverse
