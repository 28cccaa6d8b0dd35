"""A manifest that lists what somebody deleted or changed by hand, made true again.

Recipes delete files from finished checkpoints: the 16-bit weights, because an adapter
is beside them, or DeepSpeed's folder, to save room. What is left is still a
checkpoint: one that training goes on from without those weights, or weights alone.
People edit files, too, such as the chat template of a tokenizer. What no resume needs
and is whole by its own form is taken as it is now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt.folders import filenames, locks
from ckpt.runs import digests, engines
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import is_spared
from ckpt.runs.foreign import intact_files
from ckpt.runs.manifest import FileRecord, Manifest
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.upkeep import slim
from ckpt.runs.verify import may_be_edited
from converters.errors import CheckpointError, unreadable

_OPTIMIZER = "*optim_states.pt*"
_STATE = (*slim.RESUME_ONLY, "trainer_state.json", "scaler.pt", "optimizer*")


@dataclass(frozen=True, slots=True)
class Amendment:
    """The manifest without what was deleted, and what the checkpoint then is, in words.

    The digests of ``changed`` files are made when the manifest is written.
    """

    manifest: Manifest
    what: str
    changed: tuple[str, ...] = ()


def changed_files(checkpoint: RunCheckpoint) -> tuple[str, ...]:
    """Files that no resume needs and that are not as the manifest has them.

    Those of another size and, of small ones that are newer than the manifest, those with
    another digest.
    """
    manifest = checkpoint.manifest
    if manifest is None or manifest.nodes > 1:
        return ()

    return tuple(
        name
        for name, file in manifest.files.items()
        if not _is_state(name, manifest)
        and (name in checkpoint.changed or _is_edited(checkpoint.folder, name, file))
    )


def _is_edited(folder: Path, name: str, file: FileRecord) -> bool:
    """Whether a small file has other bytes of the same number."""
    if not may_be_edited(folder, name, file):
        return False
    try:
        difference = digests.unlike(folder / name, file, True, digests.quiet)
    except OSError:
        return False

    return difference is not None and difference != digests.MISSING


def amendment(checkpoint: RunCheckpoint) -> Amendment | None:
    """The manifest of a checkpoint without its deleted files, or with its changed ones.

    ``None`` if it is nothing then, or nothing was deleted or changed.
    """
    manifest, deleted_names = checkpoint.manifest, checkpoint.deleted
    if manifest is None or manifest.nodes > 1:
        return None
    if not deleted_names:
        return _taken_as_it_is(checkpoint, manifest)
    if manifest.tier != "full":
        return None

    remaining_files = {
        file_name: file
        for file_name, file in manifest.files.items()
        if file_name not in deleted_names
    }
    if not any(_is_state(file_name, manifest) for file_name in deleted_names):
        description = (
            "its weights were deleted"
            if any(is_spared(name, manifest) for name in deleted_names)
            else "files were deleted"
        )
        return Amendment(
            replace(manifest, files=remaining_files),
            f"resumable, {description}",
        )

    if engines.names(manifest):
        return None  # each of them would have to be whole in its own way

    return _weights_only(manifest, remaining_files, deleted_names)


def _taken_as_it_is(checkpoint: RunCheckpoint, manifest: Manifest) -> Amendment | None:
    """The manifest with what was changed,
    unless anything else is wrong with the checkpoint."""
    changed_names = tuple(
        name
        for name in changed_files(checkpoint)
        if intact_files.damage(checkpoint.folder, name) is None
    )
    is_all = checkpoint.committed or set(checkpoint.changed) <= set(changed_names)
    if not changed_names or not is_all:
        return None

    what = "resumable" if manifest.tier == "full" else "weights only"
    return Amendment(manifest, what, changed_names)


def _weights_only(
    manifest: Manifest, remaining_files: Mapping[str, FileRecord], deleted_names: Collection[str]
) -> Amendment | None:
    """The manifest of weights alone, if they are all there and the state is gone.

    Without the optimizer's files no training goes on from the others. These stay listed,
    since nobody has asked to delete them.
    """
    weights_left = any(
        file_name.endswith((".safetensors", ".bin")) and is_spared(file_name, manifest)
        for file_name in remaining_files
        if not _is_state(file_name, manifest)
    )
    is_deleted = any(is_spared(name, manifest) for name in deleted_names)
    has_all_weights = weights_left and not is_deleted
    states = [name for name in manifest.files if name.startswith(f"{manifest.tag}/")]
    optimizer_states = [name for name in states if fnmatchcase(name, _OPTIMIZER)]
    is_state_gone = not set(optimizer_states or states) & remaining_files.keys()
    if not has_all_weights or not is_state_gone:
        return None

    new_manifest = replace(manifest, tier="weights", tag=None, files=remaining_files)
    return Amendment(new_manifest, "weights only")


def _is_state(name: str, manifest: Manifest) -> bool:
    """Whether a resume needs the file; without DeepSpeed it needs the weights, too."""
    if manifest.tier == "full" and manifest.tag is None:
        return not is_spared(name, manifest)

    tags = engines.tags(manifest)
    folder, _, file_name = name.rpartition("/")
    is_state_name = any(fnmatchcase(file_name, form) for form in _STATE)
    is_beside = is_state_name and folder in ("", *tags)
    return is_beside or any(name.startswith(f"{tag}/") for tag in tags.values())


def amend(checkpoint: RunCheckpoint) -> None:
    """Rewrites the manifest, all at once;
    ``CheckpointError`` if the checkpoint is in use."""
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
            new_manifest = _with_digests(checkpoint.folder, planned_amendment)
            with locks.replaced(manifest_path, new_manifest.dumps()):
                slim.repoint(checkpoint.folder)


def _with_digests(folder: Path, planned_amendment: Amendment) -> Manifest:
    """The manifest with the digests of the changed files as they are now."""
    manifest = planned_amendment.manifest
    try:
        records = {name: digests.digest(folder / name) for name in planned_amendment.changed}
    except OSError as error:
        raise unreadable(error, folder) from error

    return replace(manifest, files={**manifest.files, **records})
