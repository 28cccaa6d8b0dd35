"""Checkpoints that have other names
than those they were saved under (``mv``, ``cp -r``).

What was made of one still has to find it. A record of what was made of a checkpoint
without a manifest has the name of that and its step, and no id. Under another name it is
known by what was taken over unchanged: the Trainer's state, or the step that DeepSpeed's
tag says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.ancestry import Ancestry
from ckpt.runs.checkpoint_folder import RunCheckpoint
from ckpt.runs.recognition import step_in
from converters.detect.filenames import TRAINER_STATE
from converters.storage import local

_MAX_BYTES = 1 << 28  # of a log


def source_of(
    checkpoint: RunCheckpoint, source: Ancestry, present: Iterable[RunCheckpoint]
) -> RunCheckpoint | None:
    """The one that ``checkpoint`` was made of by its record,
    ``source``, whatever its name is.

    ``None`` where a save has an id, which is known by that.
    """
    if source.save is not None or source.step is None:
        return None

    return next(
        (
            candidate
            for candidate in present
            if candidate.folder != checkpoint.folder
            and _may_be_source(candidate, checkpoint, source)
            and _has_same_state(candidate, checkpoint, source.step)
        ),
        None,
    )


def reason_not_counted(checkpoint: RunCheckpoint, counted: Sequence[RunCheckpoint]) -> str:
    """Why no rule of retention counts a checkpoint
    with another name than it was saved under."""
    if checkpoint.folder.is_symlink():
        return "a link, which no rule counts"

    manifest = checkpoint.manifest
    for entry in counted:
        is_one_save = manifest and entry.manifest and entry.manifest.save == manifest.save
        if is_one_save and entry.original and entry.folder != checkpoint.folder:
            return f"a copy of {entry.name}, which no rule counts"
    if manifest is None or checkpoint.original:
        return "copied or renamed by hand, which no rule counts"

    return f"saved as {manifest.name} and renamed by hand, so that no rule counts it"


def _may_be_source(candidate: RunCheckpoint, checkpoint: RunCheckpoint, source: Ancestry) -> bool:
    """Whether nothing in the manifest of a candidate speaks against it."""
    if candidate.source is not None and candidate.source.is_rewriting:
        return False
    manifest = candidate.manifest
    if manifest is None:
        return candidate.why == manifests.ABSENT and candidate.folder.is_dir()

    facts = (manifest.step, manifest.stage, manifest.world_size)
    is_same = facts == (source.step, source.stage, source.world_size)

    return is_same and candidate.committed and candidate.tier in ("full", checkpoint.tier)


def _has_same_state(candidate: RunCheckpoint, checkpoint: RunCheckpoint, step: int) -> bool:
    """Whether the Trainer's state is the same in both or,
    without one, the tag is of the step."""
    paths = [entry.folder / TRAINER_STATE for entry in (candidate, checkpoint)]
    try:
        has_state = [path.is_file() for path in paths]
        if all(has_state):
            sizes = {path.stat().st_size for path in paths}
            return len(sizes) == 1 and _content(paths[0]) == _content(paths[1])
        if any(has_state) and not checkpoint.is_universal:  # which takes no Trainer's state over
            return False

        if candidate.manifest is not None:
            return True
        tag = (candidate.folder / "latest").read_text("utf-8", "replace").strip()
    except OSError:
        return False

    return step_in(tag) == step


def _content(path: Path) -> bytes:
    with open(path, "rb") as stream, local.naming_path(path):
        return stream.read(_MAX_BYTES)
