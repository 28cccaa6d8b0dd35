"""Folders that Lightning's ModelCheckpoint saves into:
which is best, which is whole, deletion.

Source: Lightning 2.6.6 ``pytorch/callbacks/model_checkpoint.py``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ckpt.runs import manifest
from ckpt.runs.checkpoint_folder import WEIGHTS_ONLY
from ckpt.runs.foreign import liveness
from ckpt.runs.pruning import delete
from ckpt.runs.run import POINTERS, Run, open_checkpoint, order, without_derived
from ckpt.runs.states.skipped import COMMITTED_ONLY
from converters.errors import CheckpointError
from converters.words import shell_word

log = logging.getLogger("ckpt")


def checkpoint_folders(trainer: Any) -> list[Path]:
    """The folders that the ModelCheckpoints save to;
    Lightning makes them the same on all ranks."""
    callbacks = trainer.checkpoint_callbacks
    paths = [getattr(callback, "dirpath", None) for callback in callbacks]
    local_paths = [path for path in paths if path and not is_remote(path)]
    folders = (Path(os.path.abspath(path)) for path in local_paths)
    return list(dict.fromkeys(folders))


def is_remote(path: Any) -> bool:
    """Whether ``path`` is a URL, which fsspec writes to, and not a local path."""
    return "://" in str(path)


def point_best(run: Run, trainer: Any) -> None:
    """Makes ``best`` name the best
    of the first ModelCheckpoint that watches a metric here."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        if not getattr(callback, "monitor", None) or not best or is_remote(best):
            continue

        path = Path(os.path.abspath(best))
        if path.parent == run.path:
            try:
                run.point("best", open_checkpoint(path))
            except (OSError, CheckpointError) as error:
                log.warning("%s: best is behind: %s", run.path, error)
            return


def require_whole(path: Path, *, load_foreign: bool, committed_only: bool, says: bool) -> None:
    """Raises ``CheckpointError`` for a checkpoint that is not known to be whole.

    One that was written without ckpt has to prove it, or the user takes it unproven
    (``load_foreign``); ``committed_only`` takes none of these. Where one is taken, a
    line of the log says so if this rank ``says`` it.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.committed:
        return

    if checkpoint.why != manifest.ABSENT:
        raise CheckpointError(
            f"{path} is not whole: {checkpoint.why}; {_newest_whole(path)}", "incomplete"
        )

    if committed_only:
        remedy = f"ckpt doctor {shell_word(path)} --adopt commits it if it is whole"
        raise CheckpointError(
            f"{path} has no manifest.json, and {COMMITTED_ONLY}; {_newest_whole(path)}; {remedy}",
            "refused",
        )

    try:
        proof = liveness.prove_at_rest(path)
    except CheckpointError as error:
        reason: str | None = str(error).removeprefix(f"{path}: ")
    else:
        reason = None if proof.resumable else proof.hindrance or WEIGHTS_ONLY

    if reason is not None and not load_foreign:
        raise CheckpointError(
            f"{path} has no manifest.json, and is not whole: {reason}; {_newest_whole(path)}; "
            "load_foreign=True loads it anyway",
            "incomplete",
        )
    if not says:
        return
    if reason is None:
        log.info(
            "%s is complete, not committed (written by %s): going on from it", path, proof.kind
        )
    else:
        log.warning("%s is loaded all the same (load_foreign=True): %s", path, reason)


def _newest_whole(path: Path) -> str:
    """What an error says of the others in the folder of ``path``."""
    newest = Run(path.parent).newest()
    if newest is None:
        return f"nothing in {path.parent} is committed"
    return f"the newest committed one is {newest.folder}"


def remove(path: Path) -> None:
    """Deletes a checkpoint, or the link to one, after moving the pointers that name it."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return

    run, checkpoint = Run(path.parent), open_checkpoint(path)
    heirs = [
        sibling
        for sibling in run.checkpoints()
        if sibling.committed
        and sibling.tier == "full"
        and not _is_deleted_with(sibling.folder, path)
    ]
    heir = max(without_derived(heirs, heirs) or heirs, key=order, default=None)

    moved_pointers = []
    for name in POINTERS:
        target = run.pointer(name)
        if target is not None and _is_deleted_with(target.folder, path):
            moved_pointers.append(name)

    for name in moved_pointers:
        run.point(name, heir if name == "latest" else None)
    if path.is_symlink():
        path.unlink()
    elif (reason := delete(checkpoint)) is not None:
        log.warning("%s stays: %s; ckpt prune deletes it later", path, reason)
        for name in moved_pointers:
            run.point(name, checkpoint)


def _is_deleted_with(folder: Path, path: Path) -> bool:
    """Whether ``folder`` stops being a checkpoint
    when ``path`` is deleted: links to it too."""
    return folder == path or (not path.is_symlink() and folder.samefile(path))
