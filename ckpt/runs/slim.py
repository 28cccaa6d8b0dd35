"""A full checkpoint made a weights-only one, in an order that no crash can spoil.

    verify       every name and shape of the model is among the 16-bit weights, by their digests
    manifest     the new one, tier weights, takes the old one's place: now it is weights-only
    rename       global_step500 -> .global_step500.trash
    unlink       the trash, and what only a resume needs

A crash before the second step leaves the full checkpoint, any later one the slim one with files
that nothing lists; the same command removes these.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt import renaming
from ckpt.runs import engines, locks, manifest, pruning
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import POINTERS, Checkpoint, Run, open_checkpoint
from converters import files
from converters.errors import CheckpointError
from converters.folder import is_tag_folder
from converters.tensors import TensorRef, Weights

# Beside the tag's folder; without DeepSpeed's files nothing of it is of use.
RESUME_ONLY = (
    "latest",
    "zero_to_fp32.py",
    "zero_to_torch.py",
    "rng_state*",
    "extra_state_*",
    "scheduler.*",
    "random_states_*",
)
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Slimming:
    """What goes and what stays: names relative to the folder, and the bytes of what goes."""

    checkpoint: Checkpoint
    manifest: Manifest
    removed: tuple[str, ...]
    nbytes: int
    proven: str


def plan(checkpoint: Checkpoint, force: bool = False) -> Slimming:
    """Proves that the weights are complete, and decides what goes.

    Of a checkpoint that is slim already: what an interrupted run left. ``force`` allows the run's
    newest full one and a pinned one. ``CheckpointError`` if the weights are not complete.
    """
    held = checkpoint.manifest
    if held is None or checkpoint.why is not None:
        raise _no(checkpoint, f"is not committed ({checkpoint.why})")
    left = tuple(_surplus(checkpoint.folder, held))
    if held.tier == "weights":
        return Slimming(checkpoint, held, left, _bytes(checkpoint.folder, left), "slim already")
    if held.nodes > 1:
        raise _no(checkpoint, f"is the part of node {held.node}; join the parts with ckpt collect")
    if not force:
        newest = Run(checkpoint.folder.parent).newest()
        if newest is not None and newest.name == checkpoint.name:
            raise _no(checkpoint, "is the newest that training can go on from; --force slims it")
        if checkpoint.pinned:
            raise _no(checkpoint, "is pinned; unpin it first, or use --force")
    tags = engines.tags(held)
    proven = "; ".join(
        _require_weights(checkpoint.folder, held, name, tag) for name, tag in tags.items()
    )
    goes = tuple(name for name in held.files if _resume_only(name, tags))
    kept = {name: file for name, file in held.files.items() if name not in goes}
    slim = replace(held, tier="weights", tag=None, files=kept)
    removed = tuple(sorted({*goes, *left}))
    _require_inside(checkpoint, removed)
    return Slimming(checkpoint, slim, removed, _bytes(checkpoint.folder, removed), proven)


def _require_inside(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Raises where a link would have files removed that lie elsewhere."""
    whole = checkpoint.folder.resolve()
    for name in names:
        if not (checkpoint.folder / name).parent.resolve().is_relative_to(whole):
            raise _no(checkpoint, f"holds {name} by a link to another folder; remove that by hand")


def execute(slimming: Slimming) -> None:
    """Commits the slim state, then deletes; ``CheckpointError`` if the checkpoint is in use."""
    folder = slimming.checkpoint.folder
    lock = locks.alone(folder)
    if lock is None:
        raise _no(slimming.checkpoint, "is in use: somebody reads it; try again later")
    with lock:
        before = slimming.checkpoint.manifest
        if manifest.read(folder) != before:
            raise _no(slimming.checkpoint, "was changed by another process meanwhile; try again")
        with lock if slimming.manifest == before else replaced(folder, slimming.manifest.dumps()):
            repoint(folder)
            _sweep(folder, slimming)


def replaced(folder: Path, data: bytes) -> locks.Lock:
    """The lock of the new manifest, taken before it becomes the manifest."""
    partial = folder / f"{manifest.NAME}.partial"
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    lock = locks.Lock(fd)
    try:
        with suppress(OSError):  # no locks here
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with files.named(partial):
            files.Writer(fd).write(data, 0)
            files.sync(fd, partial)
        os.replace(partial, folder / manifest.NAME)
        files.sync_folder(folder)
    except BaseException:
        lock.release()
        partial.unlink(missing_ok=True)
        raise
    return lock


def repoint(folder: Path) -> None:
    """Pointers that named the tag now name the newest full one, or the folder alone."""
    run = Run(folder.parent)
    for name in POINTERS:
        if (run.target(name) or "").partition("/")[0] == folder.name:
            newest = run.newest() if name == "latest" else None
            run.point(name, newest or open_checkpoint(folder))


def _sweep(folder: Path, slimming: Slimming) -> None:
    tags = {Path(name).parent for name in slimming.removed if "/" in name}
    tags -= {parent for name in slimming.manifest.files for parent in Path(name).parents}
    for tag in sorted(tag for tag in tags if is_tag(folder / tag)):
        bin_ = folder / tag.parent / f".{tag.name}.trash"
        pruning.remove(bin_)
        if not renaming.renamed(folder / tag, bin_):
            pruning.remove(folder / tag)  # the new manifest does not list it any more
        files.sync_folder(bin_.parent)  # or else what is removed below might be under its old name
    for trash in sorted(folder.rglob(".*.trash")):
        pruning.remove(trash)
    for name in slimming.removed:
        (folder / name).unlink(missing_ok=True)
    renaming.remove_empty(folder)
    files.sync_folder(folder)


def is_tag(folder: Path) -> bool:
    """Whether a folder, no link, holds state files of DeepSpeed."""
    return folder.is_dir() and not folder.is_symlink() and is_tag_folder(folder)


def leftovers(checkpoint: Checkpoint) -> list[str]:
    """Files of a weights-only checkpoint that an interrupted ``slim`` should have removed."""
    held = checkpoint.manifest
    slimmed = held is not None and held.tier == "weights"
    return list(_surplus(checkpoint.folder, held)) if held and slimmed else []


def _surplus(folder: Path, held: Manifest) -> Iterator[str]:
    """Files that the manifest does not list and that only a resume would need."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        trashed = any(part.startswith(".") and part.endswith(".trash") for part in Path(name).parts)
        if name in held.files or path.is_symlink() or not (path.is_file() or trashed):
            continue
        several = dict.fromkeys(engines.names(held), "")
        if trashed or _resume_only(name, several) or ("/" in name and is_tag(path.parent)):
            yield name


def _resume_only(name: str, tags: Mapping[str, str]) -> bool:
    """Whether only a resume needs a file; ``tags`` by engine, with their folder or ""."""
    if any(tag and name.startswith(f"{tag}/") for tag in tags.values()):
        return True
    folder, _, last = name.rpartition("/")
    inside = folder in ("", *tags)
    return inside and any(fnmatchcase(last, pattern) for pattern in RESUME_ONLY)


def _bytes(folder: Path, names: tuple[str, ...]) -> int:
    paths = (folder / name for name in names)
    return sum(path.lstat().st_size for path in paths if path.is_file())


def _require_weights(folder: Path, held: Manifest, engine: str, tag: str) -> str:
    """What the weights prove to be, in a line; ``CheckpointError`` unless they are all there.

    Those of one engine, which lie in the folder of its name; of a single one (""), in ``folder``.
    """
    from converters import safetensors, zero

    model = folder / engine
    adapter = (model / ADAPTER).relative_to(folder).as_posix() in held.files
    kind = "adapter" if adapter else "model"
    try:
        found = safetensors.read(model / ADAPTER if adapter else model).tensors
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; no weights to keep, nothing was removed", error.kind
        ) from error
    paths = {extent.path for ref in found.values() for extent in ref.extents}
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    unlisted = [name for name in names if name not in held.files]
    if unlisted:
        raise CheckpointError(
            f"{folder / unlisted[0]} is not in manifest.json; nothing was removed"
        )
    weights = replace(held, files={name: held.files[name] for name in names})
    if wrong := manifest.check(folder, weights, data=True):
        raise CheckpointError(f"{folder}: the weights are damaged: {wrong[0]}; nothing was removed")
    source = zero.read(folder, tag).weights
    lost = list(_lost(source, found, adapter))
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{folder}: the {kind} weights in {names[0] if names else 'it'} are not complete: "
            f"{lost[0]}{more}; nothing was removed",
            "incomplete",
        )
    return f"{len(found)} tensors in {len(names)} files are all of the {kind}, digests verified"


def _lost(source: Weights, found: Mapping[str, TensorRef], adapter: bool) -> Iterator[str]:
    """A line for each name that the state files have and the weights do not, or in another shape.

    Tied names may be absent as long as one of them is there. Of an adapter, what is not trained
    belongs to the base model, and PEFT drops the adapter's name (peft/utils/save_and_load.py).
    """
    tied: dict[str, list[str]] = {}
    for alias, owner in source.aliases.items():
        tied.setdefault(owner, []).append(alias)
    for name, ref in source.tensors.items():
        if adapter and (name in source.frozen or name in source.buffers):
            continue
        names = [name, *tied.get(name, [])]
        there = [n for n in (map(_in_adapter, names) if adapter else names) if n in found]
        if not there:
            yield f"{name} is missing"
        elif found[there[0]].shape != ref.shape:
            yield f"{name} has shape {list(found[there[0]].shape)}, expected {list(ref.shape)}"
    for name in source.absent if not adapter else ():
        if name not in found:
            yield f"{name} is missing"


def _in_adapter(name: str) -> str:
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
    return name.removesuffix(".default")


def _no(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.folder} {why}; nothing was removed", "refused")
