"""Whether the model file and the optimizer's files count the steps of one save."""

from __future__ import annotations

import math

from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files


def contradiction(checkpoint: Checkpoint) -> str | None:
    """A sentence on the step counts, where they are not those of the model file.

    The optimizer takes no more steps than the engine, and no fewer, those aside that
    were skipped. A training that went on without its optimizer's states has fewer, too.
    """
    steps, skipped = optimizer_steps(checkpoint), checkpoint.model.root.get("skipped_steps")
    if checkpoint.step is None or steps is None:
        return None

    min_expected = checkpoint.step - (skipped if isinstance(skipped, int) else 0)
    has_fewer = min_expected >= 0 and steps < min_expected
    if steps <= checkpoint.step and not has_fewer:
        return None
    return f"the model file is of step {checkpoint.step}, the optimizer has taken {steps}"


def optimizer_steps(checkpoint: Checkpoint) -> int | None:
    """The most steps that a group of the optimizer has taken;
    ``None`` if nothing says it.

    Source: DeepSpeed 0.19.8 ``runtime/engine.py: _save_checkpoint`` (``global_steps``,
    ``skipped_steps``), and the state of torch's optimizers (``step``).
    """
    if not checkpoint.ranks:
        return None

    group_steps = [
        value
        for key, value in state_files.progress(checkpoint.ranks[0]).items()
        if key.startswith("step of group")
        and isinstance(value, (int, float))
        and math.isfinite(value)
    ]
    return int(max(group_steps)) if group_steps else None
