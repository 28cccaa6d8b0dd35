"""Whether the file ``latest`` of a run names a checkpoint that is not there.

DeepSpeed only warns then and starts at step 0 (0.19.8 ``runtime/engine.py``:
``load_checkpoint``), over the work that somebody has moved, deleted or not copied yet.
"""

from __future__ import annotations

import os
from pathlib import Path

from ckpt.runs.run import Run
from converters.detect.filenames import LATEST
from converters.errors import CheckpointError


def finding(run: Path) -> str | None:
    """That ``latest`` leads nowhere, as a sentence; ``None`` if it is absent, or leads to
    a folder."""
    text = Run(run).target(LATEST)
    if text is None or (text and os.path.isdir(run / text)):
        return None
    if not text:
        return f"{run / LATEST} is empty, and names no checkpoint"
    return f"{run / LATEST} names {text!r}, which is not there"


def require_none(run: Path) -> None:
    """``CheckpointError`` where ``latest`` leads nowhere, and there is nothing else to
    resume from: a training has been here, and a new one is begun on purpose alone."""
    if (sentence := finding(run)) is not None:
        raise CheckpointError(
            f"{sentence}, and {run} holds nothing else that can be resumed from; bring back the "
            f"checkpoint, or delete {run / LATEST} to begin a new training",
            "incomplete",
        )
