"""A manifest that lists what somebody deleted by hand, made true again.

Recipes delete files from finished checkpoints: the 16-bit weights, because an adapter
is beside them, or DeepSpeed's folder, to save room. What is left is still a
checkpoint: one that training goes on from without those weights, or weights alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ckpt.folders import filenames, locks
from ckpt.runs import engines
from ckpt.runs import manifest as manifests
from ckpt.runs.manifest import FileRecord, Manifest
from ckpt.runs.recognition import is_spare
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.upkeep import slim
from converters.errors import CheckpointError

_STATE = (*slim.RESUME_ONLY, "trainer_state.json", "scaler.pt", "optimizer*")


@dataclass(frozen=True, slots=True)
class Amendment:
    """The manifest without what was deleted, and what the checkpoint then is, in words."""

    manifest: Manifest
    what: str


def amendment(checkpoint: RunCheckpoint) -> Amendment | None:
    """What a checkpoint is without its deleted files; ``None`` if nothing is, or nothing was."""
    manifest, deleted_names = checkpoint.manifest, checkpoint.deleted
    if manifest is None or not deleted_names:
        return None
    if manifest.tier != "full" or manifest.nodes > 1:
        return None

    remaining_files = {
        file_name: file
        for file_name, file in manifest.files.items()
        if file_name not in deleted_names
    }
    if not any(_is_state(file_name, manifest) for file_name in deleted_names):
        description = (
            "its weights were deleted"
            if any(map(is_spare, deleted_names))
            else "files were deleted"
        )
        return Amendment(
            replace(manifest, files=remaining_files),
            f"resumable, {description}",
        )

    if engines.names(manifest):
        return None  # each of them would have to be whole in its own way

    return _weights_only(manifest, remaining_files, deleted_names)


def _weights_only(
    manifest: Manifest, remaining_files: Mapping[str, FileRecord], deleted_names: Collection[str]
) -> Amendment | None:
    """The manifest of weights alone, if they are all there and the state is gone."""
    weights_files = {
        file_name: file
        for file_name, file in remaining_files.items()
        if not _is_state(file_name, manifest)
    }
    weights_left = any(
        file_name.endswith((".safetensors", ".bin")) and is_spare(file_name)
        for file_name in weights_files
    )
    has_all_weights = weights_left and not any(map(is_spare, deleted_names))
    is_state_gone = not any(
        file_name.startswith(f"{manifest.tag}/") for file_name in remaining_files
    )
    if not has_all_weights or not is_state_gone:
        return None

    new_manifest = replace(manifest, tier="weights", tag=None, files=weights_files)
    return Amendment(new_manifest, "weights only")


def _is_state(name: str, manifest: Manifest) -> bool:
    """Whether a resume needs the file."""
    tags = engines.tags(manifest)
    folder, _, file_name = name.rpartition("/")
    is_state_name = any(fnmatchcase(file_name, form) for form in _STATE)
    is_beside = is_state_name and folder in ("", *tags)
    return is_beside or any(name.startswith(f"{tag}/") for tag in tags.values())


def amend(checkpoint: RunCheckpoint) -> None:
    """Rewrites the manifest, all at once; ``CheckpointError`` if the checkpoint is in use."""
    planned_amendment = amendment(checkpoint)
    if planned_amendment is None:
        return

    lock = locks.alone(checkpoint.folder)
    if lock is None:
        raise CheckpointError(
            f"{checkpoint.folder} is in use: somebody reads it; try again later",
            "refused",
        )

    with lock:
        if manifests.read(checkpoint.folder) == checkpoint.manifest:
            manifest_path = checkpoint.folder / filenames.MANIFEST
            with locks.replaced(manifest_path, planned_amendment.manifest.dumps()):
                slim.repoint(checkpoint.folder)
