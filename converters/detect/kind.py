"""A row of the table of kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converters import errors
from converters.detect.look import Look

CHECKPOINT = "the folder of a checkpoint"  # what most commands expect
DEEPSPEED = "a DeepSpeed checkpoint"  # what commands that mean ZeRO expect

# looks, and returns what it saw, which the kind's sentence quotes; or None
Sign = Callable[[Look], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A row of the table.

    ``name`` is what ``--json`` says, ``title`` what people read, ``recognized_by`` the
    sign in words. ``reader`` is "module:function", imported when it is used: from a path
    and a tag it makes a ``Source``.

    ``statement`` says what lies there, ``remedy`` which command or library handles it.
    ``refusal`` is what commands say that convert a training's states, where the kind
    holds none. The path stands before statement and refusal. In all three ``{evidence}``
    is what the sign saw, in a statement ``{expected}`` what the command reads, and in a
    refusal ``{statement}`` and ``{remedy}`` are these.

    ``trouble`` is the kind of the error. ``of_tag`` says that the sign is in the folder
    of a tag.
    """

    name: str
    title: str
    recognized_by: str
    sign: Sign
    statement: str
    remedy: str = ""
    reader: str | None = None
    refusal: str | None = None
    trouble: errors.Kind = "incomplete"
    of_tag: bool = False

    def sentence(self, evidence: str, expected: str, remedy: str = "") -> str:
        """What lies there instead of what a command expects, and what handles it.

        ``expected`` is a noun with its article, such as "a run"; ``remedy`` takes the
        place of the kind's own.
        """
        statement = self.statement.format(evidence=evidence, expected=expected)
        remedy = remedy or self.remedy.format(evidence=evidence)
        is_read = self.reader is not None and self.refusal is None
        if not self.remedy and not is_read:  # the statement says all
            return statement
        contrast = "" if "{expected}" in self.statement else f", not {expected}"
        return f"{statement}{contrast}; {remedy}" if remedy else f"{statement}{contrast}"

    def reason(self, evidence: str) -> str | None:
        """Why conversions refuse the kind, and what to do; ``None`` if they read it."""
        if self.refusal is None:
            return None
        return self.refusal.format(
            statement=self.statement.format(evidence=evidence, expected=CHECKPOINT),
            remedy=self.remedy.format(evidence=evidence),
            evidence=evidence,
        )

    def objection(self, evidence: str) -> str:
        """What a command says that reads checkpoints of DeepSpeed alone."""
        reason = self.reason(evidence)
        return self.sentence(evidence, DEEPSPEED) if reason is None else reason


class NoKindError(LookupError):
    """None of some kinds is seen at a path."""


def first(look: Look, rows: Sequence[Kind]) -> tuple[Kind, str]:
    """The first of some kinds whose sign is seen, and what was seen; else ``NoKindError``."""
    for kind in rows:
        if (evidence := kind.sign(look)) is not None:
            return kind, evidence
    raise NoKindError(f"{look.path} is of none of {len(rows)} kinds")
