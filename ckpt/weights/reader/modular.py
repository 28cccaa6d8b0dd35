"""Whether SentenceTransformer opens the folder: it needs a file for some modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt.weights.reader.verdict import LoadVerdict
from converters.errors import CheckpointError
from converters.options import CHECK, RENAME, STRIP
from converters.words import some


def judged(verdict: LoadVerdict, lacking: Sequence[str], root: Path) -> LoadVerdict:
    """The verdict on the transformer, with the modules that lack weights.

    ``CheckpointError`` (kind "unloadable") where some names belong to no module, so
    that they are probably misnamed.
    """
    if not lacking or verdict.loads is None:
        return verdict
    if verdict.unexpected:
        raise CheckpointError(
            f"{root}: SentenceTransformer would not open the output: modules.json lists "
            f"{some(lacking)}, which have no weights, and {some(verdict.unexpected)} "
            "belong to no module; give the names that modules.json says "
            f"(2.linear.weight) with {STRIP} or {RENAME}; {CHECK('none')} writes what is "
            "there",
            "unloadable",
        )

    failure = f"SentenceTransformer does not open it without weights of {some(lacking)}"

    return replace(verdict, line=f"{verdict.line}; {failure}", loads=False, failure=failure)
