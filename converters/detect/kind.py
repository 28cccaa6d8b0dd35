"""A row of the table of kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converters import errors
from converters.detect.look import Look

# looks, and returns what it saw, which the kind's sentence quotes; or None
Sign = Callable[[Look], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A row of the table.

    ``name`` is what ``--json`` says, ``title`` what people read, ``recognized_by`` the
    sign in words. ``reader`` is "module:function", imported when it is used: from a path
    and a tag it makes a ``Source``. ``refusal`` is what commands say that convert a
    training's states, where the kind holds none: the path stands before the refusal, and
    ``{evidence}`` is what the sign saw. ``trouble`` is the kind of the error. ``of_tag``
    says that the sign is in the folder of a tag.
    """

    name: str
    title: str
    recognized_by: str
    sign: Sign
    reader: str | None = None
    refusal: str | None = None
    trouble: errors.Kind = "incomplete"
    of_tag: bool = False


def first(look: Look, rows: Sequence[Kind]) -> tuple[Kind, str]:
    """The first of some kinds whose sign is seen, and what was seen; else ``LookupError``."""
    for kind in rows:
        if (evidence := kind.sign(look)) is not None:
            return kind, evidence
    raise LookupError(f"{look.path} is of none of {len(rows)} kinds")
