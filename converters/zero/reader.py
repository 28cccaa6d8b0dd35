"""DeepSpeed's state files as a ``Source``: the row "deepspeed" of ``converters.detect``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from converters.zero import checkpoint
from converters.zero.checkpoint import Checkpoint


def read(path: Path, tag: str | None = None, complete: bool = False) -> Checkpoint:
    """The weights, and the optimizer's state by the names of parameters.

    With ``complete`` as ``checkpoint.read``: everything that a training goes on from has
    to be there. Without, as ``checkpoint.weights``: its weights have to, and of several
    models ``tag`` chooses one. ``CheckpointError`` for what is damaged or incomplete.
    """
    source = checkpoint.read(path, tag) if complete else checkpoint.weights(path, tag)
    return replace(source, optimizer=partial(_optimizer, source))


def _optimizer(source: Checkpoint, name: str) -> dict[str, Any]:
    from converters.zero import optimizer_state  # which a conversion of weights needs not

    return optimizer_state.read(source, name)
