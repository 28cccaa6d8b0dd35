"""A full checkpoint made a weights-only one, in an order that no crash can spoil.

    verify       the 16-bit weights have every name, shape and value of the states, by their digests
    manifest     the new one, tier weights, takes the old one's place: now it is weights-only
    rename       global_step500 -> .global_step500.trash
    unlink       the trash, and what only a resume needs

A crash before the second step leaves the full checkpoint, any later one the slim one
with files that nothing lists; the same command removes these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt.folders import filenames, locks, replacing
from ckpt.runs import engines, pruning
from ckpt.runs import manifest as manifests
from ckpt.runs.ancestry import Ancestry
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_weights
from ckpt.runs.run import POINTERS, Run, RunCheckpoint, open_checkpoint
from ckpt.runs.states import listing
from ckpt.runs.states.status import status_of
from ckpt.runs.upkeep.kept_weights import require_weights, require_whole_weights
from converters.errors import CheckpointError
from converters.options import FORCE
from converters.storage import local
from converters.words import shell_word
from converters.zero.files.discovery import is_tag_folder

# Beside the tag's folder; without DeepSpeed's files nothing of it is of use.
RESUME_ONLY = (
    "latest",
    "zero_to_fp32.py",
    "zero_to_torch.py",
    "rng_state*",
    "extra_state_*",
    "scheduler.*",
    "random_states_*",
    "training_state.state",
    ".metadata",
    "__*_*.distcp",
)
# Of a training without DeepSpeed, relative to the folder: FSDP has folders of parts.
_STATES_WITHOUT_DEEPSPEED = (
    *("optimizer.pt", "optimizer.bin", "optimizer_*", "scaler.pt"),
    *("pytorch_model_fsdp.bin", "pytorch_model_fsdp_*"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimming:
    """The files that go and those that stay: names relative to the folder, and the
    bytes of what goes.

    ``manifest`` is the new one. ``proven`` has a line for each model whose weights stay,
    ``dtypes`` their element types, as safetensors names them.
    """

    checkpoint: RunCheckpoint
    manifest: Manifest
    removed: tuple[str, ...]
    nbytes: int
    proven: tuple[str, ...]
    dtypes: tuple[str, ...] = ()


def plan(checkpoint: RunCheckpoint, force: bool = False, progress: Progress = quiet) -> Slimming:
    """Proves that the weights are complete, and decides what goes.

    Of a checkpoint that is slim already: what an interrupted run left. ``force`` allows
    the run's newest full one and a pinned one. ``CheckpointError`` if the weights are
    not complete, or have other values than the states. ``progress`` gets the bytes of
    the weights twice (``proof_bytes``).
    """
    manifest = require_slimmable(checkpoint, force)
    if manifest.tier == "weights":
        leftover_names = tuple(_surplus(checkpoint.folder, manifest))
        return Slimming(
            checkpoint=checkpoint,
            manifest=manifest,
            removed=leftover_names,
            nbytes=_bytes_of(checkpoint.folder, leftover_names),
            proven=("slim already",),
        )

    if manifest.tag is None:
        kept_weights = [require_whole_weights(checkpoint.folder, manifest, progress)]
    else:
        kept_weights = [
            require_weights(checkpoint.folder, manifest, engine, tag_name, progress)
            for engine, tag_name in engines.tags(manifest).items()
        ]
    dtypes = {dtype for weights in kept_weights for dtype in weights.dtypes}

    return replace(
        without_states(checkpoint, manifest),
        proven=tuple(weights.line for weights in kept_weights),
        dtypes=tuple(sorted(dtypes)),
    )


def proof_bytes(checkpoint: RunCheckpoint) -> int | None:
    """Bytes that ``plan`` reports; ``None`` where it has nothing to prove."""
    manifest = checkpoint.manifest
    if manifest is None or manifest.tier == "weights":
        return None
    reads = 1 if manifest.tag is None else 2  # without states to compare with
    return reads * sum(file.size for name, file in manifest.files.items() if is_weights(name))


def require_slimmable(checkpoint: RunCheckpoint, force: bool) -> Manifest:
    """The manifest of a checkpoint that may be made a slim one, or is one already.

    ``CheckpointError`` for what is not committed, and unless ``force`` for what may be
    needed yet.
    """
    manifest = checkpoint.manifest
    if manifest is None or checkpoint.why is not None:
        raise _refusal(checkpoint, _uncommitted(checkpoint))
    if manifest.tier != "weights":
        _require_expendable(checkpoint, manifest, force)

    return manifest


def without_states(checkpoint: RunCheckpoint, manifest: Manifest) -> Slimming:
    """A full checkpoint without what only a resume needs;
    nothing is proven of its weights."""
    engine_tags = engines.tags(manifest)
    leftover_names = _surplus(checkpoint.folder, manifest)
    resume_names = {name for name in manifest.files if _resume_only(name, engine_tags)}
    remaining_files = {
        name: file for name, file in manifest.files.items() if name not in resume_names
    }
    removed_names = tuple(sorted({*resume_names, *leftover_names}))
    _require_inside(checkpoint, removed_names)

    return Slimming(
        checkpoint=checkpoint,
        manifest=replace(
            manifest,
            tier="weights",
            tag=None,
            files=remaining_files,
            source=manifest.origin or _origin(checkpoint, manifest),
        ),
        removed=removed_names,
        nbytes=_bytes_of(checkpoint.folder, removed_names),
        proven=(),
    )


def _uncommitted(checkpoint: RunCheckpoint) -> str:
    """Why a checkpoint without a valid manifest is not made a slim one,
    and what to do first."""
    if checkpoint.why != manifests.ABSENT:
        return f"is not committed ({checkpoint.why})"

    status = status_of(checkpoint)
    folder = checkpoint.folder
    command = listing.adoption_command(folder)
    if status.adoptable and not listing.is_single(folder):
        return (
            "is a save_dir of DeepSpeed, and slim is for committed checkpoints; if it is one "
            f"checkpoint of the run {folder.parent}, {command} commits it, else make the weights "
            f"with ckpt to-fp32 {shell_word(folder)}, then delete the states by hand"
        )
    if status.adoptable:
        return f"is complete, but not committed; commit it first: {command}"
    if status.tier == "weights":
        return f"is {status.description}: it holds no states that slim could remove"
    if status.complete:
        return (
            f"is complete, written by {status.writer}, and ckpt doctor does not commit such; "
            "slim is for committed checkpoints: make the weights with ckpt to-fp32 "
            f"{checkpoint.folder}, then delete it by hand"
        )

    return f"is not committed, and {status.description}"


def _origin(checkpoint: RunCheckpoint, manifest: Manifest) -> Ancestry:
    """The full checkpoint that is slimmed."""
    return Ancestry(
        "slimmed",
        name=checkpoint.name,
        save=manifest.save,
        step=manifest.step,
        world_size=manifest.world_size,
        stage=manifest.stage,
    )


def _require_expendable(checkpoint: RunCheckpoint, manifest: Manifest, force: bool) -> None:
    """``CheckpointError`` for a node's part,
    and unless ``force`` for what may be needed yet."""
    if manifest.nodes > 1:
        raise _refusal(
            checkpoint,
            f"is the part of node {manifest.node}; join the parts with ckpt collect",
        )
    if force:
        return

    if is_newest(checkpoint):
        raise _refusal(
            checkpoint,
            f"is the newest that training can go on from; {FORCE} slims it",
        )
    if checkpoint.pinned:
        raise _refusal(checkpoint, f"is pinned; unpin it first, or use {FORCE}")


def is_newest(checkpoint: RunCheckpoint) -> bool:
    """Whether it is the newest committed one that training can go on from."""
    newest = Run(checkpoint.folder.parent).newest()
    return newest is not None and newest.name == checkpoint.name


def _require_inside(checkpoint: RunCheckpoint, names: tuple[str, ...]) -> None:
    """Raises where a link would have files removed that lie elsewhere."""
    real_folder = checkpoint.folder.resolve()
    for name in names:
        if not (checkpoint.folder / name).parent.resolve().is_relative_to(real_folder):
            raise _refusal(
                checkpoint,
                f"holds {name} by a link to another folder; remove that by hand",
            )


def execute(slimming: Slimming) -> None:
    """Commits the slim state, then deletes;
    ``CheckpointError`` if the checkpoint is in use."""
    with lock_of(slimming.checkpoint) as lock:
        if slimming.manifest == slimming.checkpoint.manifest:
            commit(slimming, lock)
        else:
            manifest_path = slimming.checkpoint.folder / filenames.MANIFEST
            commit(slimming, locks.replaced(manifest_path, slimming.manifest.dumps()))


def lock_of(checkpoint: RunCheckpoint) -> locks.Lock:
    """The exclusive lock of a checkpoint; ``CheckpointError`` if it is in use, or
    another one by now."""
    lock = locks.alone(checkpoint.folder)
    if lock is None:
        raise _refusal(checkpoint, "is in use: somebody reads it; try again later")

    if manifests.read(checkpoint.folder) != checkpoint.manifest:
        lock.release()
        raise _refusal(checkpoint, "was changed by another process meanwhile; try again")

    return lock


def commit(slimming: Slimming, lock: locks.Lock) -> None:
    """Deletes what the manifest, which is there and locked, does not list any more."""
    with lock:
        repoint(slimming.checkpoint.folder)
        _sweep(slimming.checkpoint.folder, slimming)


def repoint(folder: Path) -> None:
    """Makes pointers to the tag name the newest full checkpoint, or the folder alone."""
    run_of_folder = Run(folder.parent)
    for pointer_name in POINTERS:
        if (run_of_folder.target(pointer_name) or "").partition("/")[0] == folder.name:
            newest = run_of_folder.newest() if pointer_name == "latest" else None
            run_of_folder.point(pointer_name, newest or open_checkpoint(folder))


def _sweep(folder: Path, slimming: Slimming) -> None:
    tag_paths = {Path(name).parent for name in slimming.removed if "/" in name}
    tag_paths -= {parent for name in slimming.manifest.files for parent in Path(name).parents}
    for tag in sorted(tag for tag in tag_paths if is_tag(folder / tag)):
        trash_folder = folder / tag.parent / f".{tag.name}.trash"
        pruning.remove(trash_folder)
        if not replacing.renamed(folder / tag, trash_folder):
            # the new manifest does not list it any more
            pruning.remove(folder / tag)
        # or else what is removed below might be under its old name
        local.sync_folder(trash_folder.parent)

    for trash_path in sorted(folder.rglob(".*.trash")):
        pruning.remove(trash_path)
    for name in slimming.removed:
        (folder / name).unlink(missing_ok=True)
    replacing.remove_empty(folder)
    local.sync_folder(folder)


def is_tag(folder: Path) -> bool:
    """Whether a folder, not a link, holds state files of DeepSpeed."""
    return folder.is_dir() and not folder.is_symlink() and is_tag_folder(folder)


def leftovers(checkpoint: RunCheckpoint) -> list[str]:
    """Files of a weights-only checkpoint
    that an interrupted ``slim`` should have removed."""
    manifest = checkpoint.manifest
    is_slim = manifest is not None and manifest.tier == "weights"
    return list(_surplus(checkpoint.folder, manifest)) if manifest and is_slim else []


def _surplus(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest does not list and that only a resume would need."""
    for path in sorted(folder.rglob("*")):
        relative_path = path.relative_to(folder).as_posix()
        is_trashed = any(
            part.startswith(".") and part.endswith(".trash") for part in Path(relative_path).parts
        )
        if (
            relative_path in manifest.files
            or path.is_symlink()
            or not (path.is_file() or is_trashed)
        ):
            continue

        engine_folders = dict.fromkeys(engines.names(manifest), "")
        if (
            is_trashed
            or _resume_only(relative_path, engine_folders)
            or ("/" in relative_path and is_tag(path.parent))
        ):
            yield relative_path


def _resume_only(relative_path: str, tags_by_engine: Mapping[str, str]) -> bool:
    """Whether only a resume needs a file; ``tags_by_engine`` by engine, with their
    folder or ""."""
    if any(
        tag_path and relative_path.startswith(f"{tag_path}/")
        for tag_path in tags_by_engine.values()
    ):
        return True

    folder, _, file_name = relative_path.rpartition("/")
    is_beside_tag = folder in ("", *tags_by_engine)

    is_resume_name = any(fnmatchcase(file_name, pattern) for pattern in RESUME_ONLY)
    # the stars match folders, too
    is_state = any(fnmatchcase(relative_path, form) for form in _STATES_WITHOUT_DEEPSPEED)

    return is_state or (is_beside_tag and is_resume_name)


def _bytes_of(folder: Path, file_names: tuple[str, ...]) -> int:
    paths = (folder / file_name for file_name in file_names)
    return sum(path.lstat().st_size for path in paths if path.is_file())


def _refusal(checkpoint: RunCheckpoint, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder} {reason}; nothing was removed",
        "refused",
    )
