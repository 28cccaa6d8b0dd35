"""Resuming a training without DeepSpeed (FSDP, DDP, one process), which loads by itself.

Its trainer reads the files. Here the checkpoint is chosen and looked at, and what does
not come back is said: the files of FSDP and DDP load on any number of ranks, the random
states of ranks do not.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.layout import Topology
from ckpt.engine.progress import settings_in
from ckpt.folders import filenames
from ckpt.resuming import select
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import NO_RANDOM_STATES, RankState, ResumePoint
from ckpt.resuming.select import VerifyLevel
from ckpt.resuming.value_text import OTHER_FILES, file_form
from ckpt.runs.foreign.completeness import has_tag
from ckpt.runs.run import RunCheckpoint, open_checkpoint
from converters.errors import CheckpointError
from converters.words import counted

log = logging.getLogger("ckpt")


def newest(
    ranks: RankGroup,
    path: Path,
    tag: str | None = None,
    *,
    verify: VerifyLevel = "structure",
    load_foreign: bool = False,
    committed_only: bool = False,
) -> RunCheckpoint | None:
    """The newest whole checkpoint of a run,
    or the one that is named; every rank calls it.

    ``None`` if the run has none yet. ``CheckpointError`` on every rank for one of
    DeepSpeed, and as ``select.select_checkpoint``.
    """
    checkpoint = select.select_checkpoint(
        ranks,
        path,
        tag,
        verify,
        load_foreign,
        deepspeed=False,
        committed_only=committed_only,
    )
    if checkpoint is not None:
        with ranks.step():
            require_plain(checkpoint.folder)
    return checkpoint


def require_plain(folder: Path) -> None:
    """``CheckpointError`` for a checkpoint of DeepSpeed,
    of which only the weights would load.

    Trainers begin with a new optimizer then, without a word.
    """
    if not folder.is_dir():
        return
    manifest = open_checkpoint(folder).manifest
    is_deepspeeds = has_tag(folder) if manifest is None else manifest.tag is not None
    if is_deepspeeds and not (folder / "optimizer.pt").exists():
        raise CheckpointError(
            f"{folder} was saved with DeepSpeed, this training has none: its optimizer and random "
            "states are not loaded; give it DeepSpeed again, or name another checkpoint",
            "unsupported",
        )


def require_same_files(folder: Path, form: str) -> None:
    """``CheckpointError`` for a committed checkpoint whose files have another form than
    those that this training reads: ``SHARDED_STATE_DICT``, ``FULL_STATE_DICT`` or ``none``."""
    manifest = open_checkpoint(folder).manifest if folder.is_dir() else None
    settings = settings_in((manifest and manifest.progress) or {})
    saved = settings.get("topology", {}).get("sharding")
    if saved is not None and form and file_form(saved) != form:
        raise CheckpointError(
            f"{folder}: sharding: {saved} saved, {form} now; {OTHER_FILES}", "refused"
        )


def point_of(checkpoint: RunCheckpoint) -> ResumePoint | None:
    """A committed checkpoint as a ``ResumePoint``;
    ``None`` without a manifest, which notes nothing."""
    manifest = checkpoint.manifest
    if manifest is None:
        return None

    data = (checkpoint.folder / filenames.MANIFEST).read_bytes()
    return ResumePoint(
        folder=checkpoint.folder,
        tag="",
        step=manifest.step,
        topology=Topology(0, manifest.world_size),
        digest=sha256(data).hexdigest()[:12],
        progress=manifest.progress,
        metrics=manifest.metrics,
        manifest=manifest,
    )


def own_state(request: ResumeRequest, source: ResumePoint) -> RankState:
    """This rank's own state; what does not come back is said, or ``CheckpointError``."""
    ranks = request.ranks
    remark = other_ranks_line(source, ranks.world)
    if remark is not None and not ranks.rank:
        log.warning("%s: %s", source.folder, remark)

    state = RankState.read(source, ranks.rank)
    losses = state.lost(request.extra)
    if remark is not None or not source.saved_by_ckpt:  # the trainer has files of its own
        losses = [line for line in losses if line != NO_RANDOM_STATES]
    if losses and request.on_mismatch == "error" and remark is None:
        raise CheckpointError(f"{source.folder}: {losses[0]}", "incomplete")
    for line in losses:
        log.warning("%s: %s", source.folder, line)
    return state


def other_ranks_line(source: ResumePoint | None, world_size: int) -> str | None:
    """That a checkpoint was saved by another number of ranks, as a line after its name.

    Then random states are not as they were, and that is no fault; else ``None``.
    """
    saved_ranks = world_size if source is None else source.topology.world_size
    if saved_ranks == world_size:
        return None
    return (
        f"it was saved by {counted(saved_ranks, 'rank')}, this training has {world_size}: weights, "
        "optimizer and scheduler are loaded whole; random states are each rank's own, so that "
        "dropout and shuffling do not go on as they were"
    )
