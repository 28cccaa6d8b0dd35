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

    ``contrast`` stands for "not EXPECTED" where that would be wrong of the kind.
    ``trouble`` is the kind of the error. ``of_tag`` says that the sign is in the folder
    of a tag, ``of_states`` that a file has a part of a training's states and no weights.
    """

    name: str
    title: str
    recognized_by: str
    sign: Sign
    statement: str
    remedy: str = ""
    reader: str | None = None
    refusal: str | None = None
    contrast: str = ""
    trouble: errors.Kind = "incomplete"
    of_tag: bool = False
    of_states: bool = False

    @property
    def is_opened(self) -> bool:
        """Whether it is read as it is, and has no states to convert."""
        return self.reader is not None and self.refusal is not None

    @property
    def holds_weights(self) -> bool:
        """Whether it has weights that are read as they are, and no states to convert."""
        return self.is_opened and not self.of_states

    def description(self, evidence: str, expected: str = CHECKPOINT) -> str:
        """A description to stand after the path: "is a model in safetensors"."""
        return self.statement.format(evidence=evidence, expected=expected)

    def sentence(self, evidence: str, expected: str, remedy: str = "") -> str:
        """The sentence on what lies there instead of what a command expects,
        and what handles it.

        ``expected`` is a noun with its article, such as "a run"; ``remedy`` takes the
        place of the kind's own.
        """
        statement = self.description(evidence, expected)
        remedy = remedy or self.remedy.format(evidence=evidence)
        is_read = self.reader is not None and self.refusal is None
        if not self.remedy and not is_read:  # the statement says all
            return statement
        contrast = f", {self.contrast or f'not {expected}'}"
        if "{expected}" in self.statement:
            contrast = ""
        return f"{statement}{contrast}; {remedy}" if remedy else f"{statement}{contrast}"

    def reason(self, evidence: str) -> str | None:
        """Why conversions refuse the kind, and what to do; ``None`` if they read it."""
        if self.refusal is None:
            return None
        return self.refusal.format(
            statement=self.description(evidence),
            remedy=self.remedy.format(evidence=evidence),
            evidence=evidence,
        )

    def objection(self, evidence: str) -> str:
        """The objection of a command that reads checkpoints of DeepSpeed alone."""
        reason = self.reason(evidence)
        return self.sentence(evidence, DEEPSPEED) if reason is None else reason


class NoKindError(LookupError):
    """None of some kinds is seen at a path."""


def first(look: Look, rows: Sequence[Kind]) -> tuple[Kind, str]:
    """The first of some kinds whose sign is seen,
    and what was seen; else ``NoKindError``."""
    for kind in rows:
        if (evidence := kind.sign(look)) is not None:
            return kind, evidence
    raise NoKindError(f"{look.path} is of none of {len(rows)} kinds")
