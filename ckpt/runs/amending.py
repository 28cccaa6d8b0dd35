"""A manifest that lists what somebody deleted by hand, made true again.

Recipes delete files from finished checkpoints: the 16-bit weights, because an adapter is beside
them, or DeepSpeed's folder, to save room. What is left is a checkpoint all the same: one that
training goes on from without those weights, or weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ckpt.runs import engines, locks, slim
from ckpt.runs import manifest as manifests
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_spare
from ckpt.runs.run import Checkpoint
from converters.errors import CheckpointError

_STATE = (*slim.RESUME_ONLY, "trainer_state.json", "scaler.pt", "optimizer*")


@dataclass(frozen=True, slots=True)
class Amendment:
    """The manifest without what was deleted, and what the checkpoint then is, in words."""

    manifest: Manifest
    what: str


def amendment(checkpoint: Checkpoint) -> Amendment | None:
    """What a checkpoint is without its deleted files; ``None`` if nothing is, or nothing was."""
    held, gone = checkpoint.manifest, checkpoint.deleted
    if held is None or not gone or held.tier != "full" or held.nodes > 1:
        return None
    left = {name: file for name, file in held.files.items() if name not in gone}
    if not any(_is_state(name, held) for name in gone):
        weights = "its weights were deleted" if any(map(is_spare, gone)) else "files were deleted"
        return Amendment(replace(held, files=left), f"resumable, {weights}")
    if engines.names(held):
        return None  # each of them would have to be whole in its own way
    kept = {name: file for name, file in left.items() if not _is_state(name, held)}
    weights_left = any(name.endswith((".safetensors", ".bin")) and is_spare(name) for name in kept)
    whole = weights_left and not any(is_spare(name) for name in gone)
    emptied = not any(name.startswith(f"{held.tag}/") for name in left)
    if whole and emptied:
        return Amendment(replace(held, tier="weights", tag=None, files=kept), "weights only")
    return None


def _is_state(name: str, held: Manifest) -> bool:
    """Whether a resume needs the file."""
    tags = engines.tags(held)
    folder, _, last = name.rpartition("/")
    beside = folder in ("", *tags) and any(fnmatchcase(last, form) for form in _STATE)
    return beside or any(name.startswith(f"{tag}/") for tag in tags.values())


def amend(checkpoint: Checkpoint) -> None:
    """Rewrites the manifest, all at once; ``CheckpointError`` if the checkpoint is in use."""
    made = amendment(checkpoint)
    if made is None:
        return
    lock = locks.alone(checkpoint.folder)
    if lock is None:
        raise CheckpointError(
            f"{checkpoint.folder} is in use: somebody reads it; try again later", "refused"
        )
    with lock:
        if manifests.read(checkpoint.folder) == checkpoint.manifest:
            with slim.replaced(checkpoint.folder, made.manifest.dumps()):
                slim.repoint(checkpoint.folder)
