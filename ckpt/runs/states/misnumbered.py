"""Checkpoints whose names say a later step than their files,
and why they are passed over.

A resume goes by the step that a Trainer wrote. So checkpoint-6 with a trainer_state.json
of step 4 comes after checkpoint-4, which is taken; that it is there, and why it is not
taken, is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import RunCheckpoint, require_read
from ckpt.runs.foreign import liveness
from ckpt.runs.foreign.overwriting import require_one_save
from ckpt.runs.states.status import subjectless
from converters.errors import CheckpointError


def reasons(checkpoints: Iterable[RunCheckpoint], step: int) -> Iterator[tuple[Path, str]]:
    """Those without a manifest whose names say a later step,
    each with words after its name.

    What ckpt made of another one has a record of its step.
    """
    for checkpoint in checkpoints:
        is_made = checkpoint.source is not None or checkpoint.conversion is not None
        if checkpoint.why == manifests.ABSENT and not is_made and (checkpoint.step or 0) > step:
            yield checkpoint.folder, _reason(checkpoint.folder)


def _reason(path: Path) -> str:
    try:
        proof = liveness.prove_at_rest(path)
        require_one_save(path, proof.tag)
    except CheckpointError as error:
        require_read(error)
        return torn_reason(error, path)

    return f"it is of step {proof.step}, whatever its name says"


def torn_reason(error: CheckpointError, path: Path) -> str:
    """Why a checkpoint without a manifest is not whole, as words after its name."""
    reason = subjectless(str(error), path)
    if str(error).startswith(f"{path} "):  # whose subject the sentence needs
        reason = f"it {reason}"
    return f"it has no manifest.json, and is not whole: {reason}"
