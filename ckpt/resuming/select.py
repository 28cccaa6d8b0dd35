"""Which checkpoint a training goes on from: the newest that is whole, the same on every rank.

Rank 0 offers one after the other, the newest first (``candidates``), and every rank
says whether it sees the same save (and, where nodes have folders of their own, its
node's part of it) until all accept one. What is passed over is named on stderr, with
the reason. Nothing is ever chosen by default: a run whose checkpoints are all unusable
is an error, no fresh start. One that holds weights alone begins at step 0, and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from ckpt.distributed.ranks import TIMEOUT, RankGroup, Step
from ckpt.resuming import configured
from ckpt.resuming.agreement import Sight, mismatch, rank_of
from ckpt.resuming.candidates import (
    WEIGHTS_ONLY,
    Offers,
    TopologyFilter,
    candidate,
    require_deepspeed,
    unusable,
)
from ckpt.resuming.target import interpret
from ckpt.resuming.topology import Reshard
from ckpt.runs import manifest as manifests
from ckpt.runs.foreign import liveness
from ckpt.runs.lineage import Line
from ckpt.runs.run import (
    Run,
    RunCheckpoint,
    is_checkpoint,
    is_numbered,
    is_run,
    members,
)
from ckpt.runs.verify import states
from converters.errors import CheckpointError
from converters.storage.store import local_path

log = logging.getLogger("ckpt")

__all__ = ["TopologyFilter", "VerifyLevel", "find", "select_checkpoint"]
VerifyLevel = Literal["structure", "data"]


def find(
    path: str | os.PathLike[str],
    *,
    verify: VerifyLevel = "structure",
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
) -> str | None:
    """The newest whole checkpoint of a run, for ``resume_from_checkpoint``; ``None`` without any.

    Whatever wrote it: ckpt, or the Trainer (with DeepSpeed, FSDP, DDP, or on one GPU),
    Accelerate, Lightning or DeepSpeed alone, in which case it has to prove that it is
    whole. ``path`` may be a checkpoint too. In a process group every rank calls it and
    gets the same answer; ``verify="data"`` reads every byte. ``CheckpointError`` if
    there are checkpoints and none can be used, or it is not clear which of them is of
    this training.

    Of several of one step, the one of this world size and ZeRO stage is taken, as far
    as these are known: with a process group, and from the configuration that the
    Trainer's arguments or Accelerate hold. One that does not load here is named on
    stderr; ``reshard="auto"`` reshards it beside it, once, and returns that.
    """
    ranks = RankGroup("find", timeout) if dist.is_initialized() else None
    checkpoint = select_checkpoint(
        ranks, local_path(path), None, verify, fits=configured.fits(ranks), deepspeed=False
    )
    if checkpoint is None:
        return None
    return str(configured.offer(ranks, checkpoint.folder, reshard))


def select_checkpoint(
    ranks: RankGroup | None,
    path: Path,
    tag: str | None = None,
    thorough: VerifyLevel = "structure",
    load_foreign: bool = False,
    fits: TopologyFilter | None = None,
    deepspeed: bool = True,
) -> RunCheckpoint | None:
    """The checkpoint at ``path``, the one of this tag (or name, or step) in the run
    there, or the newest of that run; ``None`` if the run has none yet.

    ``load_foreign`` takes a checkpoint without a manifest that is asked for, though it
    cannot prove to be whole. Among those of one step, one that ``fits`` comes first.
    ``deepspeed``: whether it is DeepSpeed that will load it.
    """
    path = Path(os.path.abspath(path))
    with _step(ranks) as target:
        if thorough not in ("structure", "data"):
            raise CheckpointError(
                f"verify={thorough!r}, expected structure or data",
                "refused",
            )
        target.value = interpret(path, tag, fits) if rank_of(ranks) == 0 else None

    kind, name = target.heard[0]
    if kind == "nothing":
        with _step(ranks) as objections:
            _require_nothing(path, [])
        return None

    if kind == "run":
        return _newest(ranks, path, thorough == "data", fits, deepspeed)

    folder = path if name is None else path / name
    with _step(ranks) as offer:
        if rank_of(ranks) == 0:
            offer.value = _requested(folder, tag, load_foreign, deepspeed).plain()

    sight = Sight.parse(offer.heard[0])
    with _step(ranks) as objections:
        objections.value = mismatch(ranks, folder, sight, thorough == "data")
    with _step(ranks):
        for rank, reason in enumerate(objections.heard if rank_of(ranks) == 0 else ()):
            if reason is not None:
                raise CheckpointError(f"rank {rank}: {folder}: {reason}", "incomplete")

    return candidate(folder)


def _requested(
    folder: Path,
    tag: str | None,
    load_foreign: bool,
    deepspeed: bool,
) -> Sight:
    """The checkpoint that was asked for, on rank 0.

    ``CheckpointError`` unless it is whole, as far as rank 0 can see without reading
    every byte.
    """
    checkpoint = candidate(folder)
    if checkpoint.manifest is None and checkpoint.why == manifests.ABSENT:
        tag_folder = tag if tag is not None and (folder / tag).is_dir() else None
        if load_foreign and states(folder, tag_folder)[1] is None:
            return Sight.of(checkpoint)

        proof = liveness.prove_at_rest(folder, tag_folder)
        if not proof.resumable:
            raise CheckpointError(
                f"{folder} cannot be resumed from: {WEIGHTS_ONLY}",
                "incomplete",
            )

        if deepspeed:
            require_deepspeed(proof)
        log.info("%s was written without ckpt and is whole", folder)
        return Sight.of(checkpoint)

    reason = unusable(checkpoint)
    if reason is not None:
        siblings = reversed(_of_its_run(checkpoint))
        usable = (sibling for sibling in siblings if sibling.unusable is None)
        newest = next(usable, None)
        alternative = f"; the newest committed one is {newest.folder}" if newest else ""
        raise CheckpointError(
            f"{folder} cannot be resumed from: {reason}{alternative}", "incomplete"
        )

    return Sight.of(checkpoint)


def _of_its_run(checkpoint: RunCheckpoint) -> list[RunCheckpoint]:
    """The other committed checkpoints of the same run, which an error may offer instead.

    What lies beside a folder may be of another training: the manifests tell. Without
    one, only what is numbered as it is counts.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    siblings = Run(folder.parent).checkpoints()
    if manifest is not None and manifest.run is not None:
        line_members = members(siblings, Line.of(manifest))
        return [member for member in line_members if member.folder != folder]
    if not is_numbered(folder):
        return []

    committed = [sibling for sibling in siblings if sibling.folder != folder and sibling.manifest]
    return [checkpoint for checkpoint in committed if is_numbered(checkpoint.folder)]


def _newest(
    ranks: RankGroup | None, run: Path, data: bool, fits: TopologyFilter | None, deepspeed: bool
) -> RunCheckpoint | None:
    with _step(ranks):
        offers = Offers(run, fits, deepspeed) if rank_of(ranks) == 0 else None
    remaining_offers = iter(offers or ())
    while True:
        with _step(ranks) as offer_step:
            offer = next(remaining_offers, None)
            if offer is not None:
                offer_step.value = Sight.of(offer.checkpoint).plain()

        if offer_step.heard[0] is None:
            break

        sight = Sight.parse(offer_step.heard[0])
        path = run / sight.name
        with _step(ranks) as objections:
            objections.value = mismatch(ranks, path, sight, data)
        with _step(ranks) as verdict:
            reasons = [
                f"rank {rank}: {reason}"
                for rank, reason in enumerate(objections.heard)
                if reason is not None
            ]
            if offers is not None and reasons:
                _require_shared(sight, path, reasons[0])
                verdict.value = reasons[0]
                offers.skip(path, reasons[0])

        if verdict.heard[0] is None:
            if offer is not None and offer.proof is not None:
                log.info("%s was written without ckpt and is whole: going on from it", path)
            return candidate(path)

    with _step(ranks) as offered_names:
        if offers is not None:
            offers.require_none_lost()
            offered_names.value = [checkpoint.name for checkpoint in offers.checkpoints]

    with _step(ranks):
        _require_nothing(run, offered_names.heard[0])
    return None


def _require_shared(sight: Sight, path: Path, reason: str) -> None:
    """``CheckpointError`` if a rank does not see a folder that is one for all nodes."""
    if sight.parts == 1 and "does not see" in reason:
        raise CheckpointError(
            f"{reason}: {path}, which rank 0 sees; name a folder that all ranks share",
            "incomplete",
        )


def _require_nothing(run: Path, known_names: list[str]) -> None:
    """``CheckpointError`` if this rank sees a checkpoint to resume from that rank 0 does not."""
    if not run.is_dir() or (is_checkpoint(run) and not is_run(run)):
        return

    unknown_checkpoints = [
        checkpoint
        for checkpoint in Run(run).checkpoints()
        if checkpoint.unusable is None and checkpoint.name not in known_names
    ]
    if unknown_checkpoints:
        raise CheckpointError(
            f"this rank sees {unknown_checkpoints[-1].folder}, rank 0 sees no "
            "checkpoint that can be resumed from; name a folder that all ranks "
            "share, or bring back that of node 0",
            "incomplete",
        )


@contextmanager
def _step(ranks: RankGroup | None) -> Iterator[Step]:
    """A step of all ranks, or of the only one."""
    if ranks is not None:
        with ranks.step() as step:
            yield step
        return
    step = Step()
    yield step
    step.heard = [step.value]
