"""The folders that an output may replace: what ckpt made,
and models; nothing that a training saved."""

from __future__ import annotations

from pathlib import Path

from ckpt.folders.replacing import is_arriving
from ckpt.runs import user_paths
from ckpt.runs.checkpoint_folder import open_checkpoint
from ckpt.runs.recognition import is_run
from converters.errors import CheckpointError
from converters.options import OUTPUT


def require_replaceable(output: Path) -> None:
    """``CheckpointError`` where an output would replace states that a training saved.

    What ``ckpt`` made of a checkpoint may be made again, and a model folder replaced;
    not a checkpoint, nor a folder that holds some.
    """
    if not output.is_dir() or is_arriving(output) or _is_made_of_another(output):
        return

    from ckpt.runs.foreign import signs

    if is_run(output) or user_paths.holds_checkpoints(output) or signs.candidates(output):
        what = "holds checkpoints of a training"
    elif user_paths.is_filled_checkpoint(output) or signs.has_signs(output):
        what = "is a checkpoint of a training"
    else:
        return

    raise CheckpointError(
        f"{output} {what}, which the output would replace; name another folder with {OUTPUT}",
        "output",
    )


def _is_made_of_another(output: Path) -> bool:
    """Whether a folder says that ckpt made it of a checkpoint, damaged or not."""
    source = open_checkpoint(output).source
    return source is not None and source.is_rewriting
