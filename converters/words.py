"""Lists and numbers in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONG_LIST = 6  # names in a message that is about names


def some(items: Iterable[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    all_items = list(items)
    remaining = len(all_items) - limit
    return ", ".join(all_items[:limit]) + (f" and {remaining:,} more" if remaining > 0 else "")


def more(count: int) -> str:
    """How many more there are than a message has: `` (and 2 more)``, nothing for none."""
    return f" (and {count} more)" if count > 0 else ""


def first(items: Sequence[str]) -> str:
    """The first of one or several, and how many more there are: ``a (and 2 more)``."""
    return f"{items[0]}{more(len(items) - 1)}"


def shell_word(value: object) -> str:
    """A path or text as an argument of a command to type: ``'my run'``, with its quotes."""
    from shlex import quote

    return quote(str(value))


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 name``, ``2 names``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shape(dimensions: Iterable[int]) -> str:
    """A tensor's shape: ``2 x 3``; ``scalar`` if it has no dimensions."""
    return " x ".join(map(str, dimensions)) or "scalar"


def numbers(values: Iterable[object], limit: int = 8) -> str:
    """The first of some numbers, and how many more there are: ``0, 2, 3``."""
    return some(map(str, values), limit)


def verb(number: int, singular: str, plural: str) -> str:
    """The form of a verb for a number of things: ``is`` or ``are``."""
    return singular if number == 1 else plural


# Letters whose own names begin with a vowel: an FSDP checkpoint, an IA3 adapter.
_SPELT_WITH_VOWEL = frozenset("AEFHILMNORSX")
_VOWEL_SOUND = ("hour", "honest", "heir", "ndarray")
_CONSONANT_SOUND = (
    "unic",
    "unif",
    "unio",
    "uniq",
    "unit",
    "univ",
    "use",
    "usu",
    "util",
    "eu",
    "one",
    "once",
)


def with_article(noun: str) -> str:
    """A noun with "a" or "an", by its sound: ``an IA3``, ``a LoRA``, ``a universal``."""
    return f"{'an' if _begins_with_vowel_sound(noun) else 'a'} {noun}"


def _begins_with_vowel_sound(noun: str) -> bool:
    word = re.split(r"[ -]", noun, maxsplit=1)[0]
    if word.isupper():  # an abbreviation, which is spelt
        return word[0] in _SPELT_WITH_VOWEL

    word = word.lower()
    if word.startswith(_VOWEL_SOUND):
        return True
    return word.startswith(tuple("aeiou")) and not word.startswith(_CONSONANT_SOUND)
