"""The kinds of what can lie where a checkpoint is looked for:
a table with a row a kind.

The first row whose sign is seen is the kind, so the order decides: a sign that is more
particular stands before one that takes the same paths as well. A new input format is a
folder with its reader, and a row in one of the modules that this one joins
(docs/decisions/0011-source-and-detect.md). ``docs/inputs.md`` shows the table to users;
a test holds the two together.
"""

from __future__ import annotations

import re
from pathlib import Path

from converters import errors
from converters.detect import deepspeed, files, foreign, others, sharded, weights
from converters.detect.kind import Kind, NoKindError, first
from converters.detect.look import Look

_MAX_SUBFOLDERS = 16  # that are looked into for what a folder holds


def _holds(look: Look) -> str | None:
    """The last folder in the path that is of a known kind, and what it is."""
    inner = _first_inner(look)
    if inner is None:
        return None
    name, kind, evidence = inner
    reason = kind.reason(evidence)
    if reason is None or kind.reader is not None:  # it is read where its own path is given
        reason = f"{kind.description(evidence)}: name {look.path / name}"
    return f"{name}, which {reason}"


def trouble(kind: Kind, path: Path) -> errors.Kind:
    """The kind of an error about a path:
    of a folder of checkpoints, that of what it holds."""
    inner = _first_inner(Look(path)) if kind in _PARENT else None
    return kind.trouble if inner is None else inner[1].trouble


def _first_inner(look: Look) -> tuple[str, Kind, str] | None:
    """The last folder in the path, by numbers, that is of a known kind: its name, the
    kind, the sign."""
    inner_kinds = _inner_kinds()
    for name in sorted(look.names, key=_numbered, reverse=True)[:_MAX_SUBFOLDERS]:
        inner = Look(look.path / name)
        if name.startswith(".") or not inner.is_folder:
            continue
        try:
            kind, evidence = first(inner, inner_kinds)
        except (NoKindError, OSError):
            continue
        return name, kind, evidence

    return None


def _inner_kinds() -> list[Kind]:
    """The kinds of folders by which a folder of checkpoints is known: what is read, and
    what is refused of the same sort.

    A folder of DeepSpeed's checkpoints has a row of its own, ``deepspeed-several``.
    """
    names = {kind.name for kind in (*OF_TAG, *sharded.KINDS, *weights.KINDS)}
    names_of_deepspeed = {kind.name for kind in deepspeed.KINDS}

    return [
        kind
        for kind in KINDS
        if kind.name in names or (kind.reader and kind.name not in names_of_deepspeed)
    ]


def _numbered(name: str) -> list[tuple[int, str]]:
    """A name as it is ordered: step_10 comes after step_9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


_PARENT = (
    Kind(
        name="parent",
        title="folder of checkpoints",
        recognized_by="a folder of one of the kinds above in it",
        sign=_holds,
        statement="is a folder of checkpoints; it holds {evidence}",
        refusal="{statement}",
    ),
)

KINDS = (
    *others.NOTHING,
    *files.KINDS,
    *foreign.FIRST,
    *deepspeed.KINDS,
    *sharded.KINDS,
    *weights.KINDS,
    *foreign.FILES,
    *_PARENT,
    *others.FIRST,
    *foreign.FOLDERS,
    *others.KINDS,
)
OF_TAG = tuple(kind for kind in KINDS if kind.of_tag)
# of weights alone: what ``ckpt.open`` takes before state files that nothing points to
WEIGHTS = tuple(kind for kind in weights.KINDS if kind.reader and not kind.of_states)
# checkpoints that a Trainer or Accelerate goes on from by the weights in them
WITHOUT_DEEPSPEED = tuple(kind for kind in weights.KINDS if kind.name in ("trainer", "accelerate"))
BY_NAME = {kind.name: kind for kind in KINDS}
