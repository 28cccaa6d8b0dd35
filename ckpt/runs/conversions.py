"""The origin of weights that ckpt made of a checkpoint: ``conversion.json``.

``ckpt.weights.conversion`` writes it into every folder of weights. Nothing is proven by
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ckpt.folders.filenames import CONVERSION
from ckpt.runs.ancestry import document_in
from converters.accessors import is_whole_number

MAX_BYTES = 64 << 20  # it names every file and what is absent


class WeightsOrigin(NamedTuple):
    """The tag or file that weights were made of,
    and its step; ``None`` for what is not known."""

    tag: str | None
    step: int | None

    @property
    def sentence(self) -> str:
        """How the weights were made, as words after their name."""
        step = "" if self.step is None else f" of step {self.step}"
        return f"weights made from {self.tag or 'another checkpoint'}{step}"


def conversion_in(folder: Path) -> WeightsOrigin | None:
    """The content of ``conversion.json`` of a folder; ``None`` if it has none, or not
    one of ours.

    ``CheckpointError`` if the disk or network fails.
    """
    document = document_in(folder / CONVERSION, MAX_BYTES)
    source = document.get("source") if isinstance(document, dict) and "ckpt" in document else None
    if not isinstance(source, dict):
        return None

    tag, step = source.get("tag"), source.get("step")
    return WeightsOrigin(
        tag if isinstance(tag, str) and tag.isprintable() else None,
        step if is_whole_number(step) else None,
    )
