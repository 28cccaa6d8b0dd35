"""Which checkpoint a training goes on from:
the newest that is whole, the same on every rank.

Rank 0 offers one after the other, the newest first (``candidates``), and every rank
says whether it sees the same save (and, where nodes have folders of their own, its
node's part of it) until all accept one. What is passed over is named on stderr, with
the reason. Nothing is ever chosen by default: a run whose checkpoints are all unusable
is an error, no fresh start. One that holds weights alone begins at step 0, and says so.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckpt.distributed.step import TIMEOUT, Step
from ckpt.resuming.agreement import Sight, mismatch, rank_of
from ckpt.runs.run import Run, RunCheckpoint, is_checkpoint, is_run
from ckpt.runs.states.choice import requested
from ckpt.runs.states.listing import candidate
from ckpt.runs.states.offer_order import TopologyFilter
from ckpt.runs.states.offers import Offer, Offers
from ckpt.runs.states.target import interpret
from converters.errors import CheckpointError
from converters.storage.store import local_path

if TYPE_CHECKING:
    from ckpt.distributed.ranks import RankGroup
    from ckpt.resuming.topology import Reshard

log = logging.getLogger("ckpt")
# what was said of: the Trainer asks several times while it resumes once
_ANNOUNCED: set[Path] = set()

__all__ = ["TopologyFilter", "VerifyLevel", "find", "select_checkpoint"]
VerifyLevel = Literal["structure", "data"]


def find(
    path: str | os.PathLike[str],
    *,
    verify: VerifyLevel = "structure",
    committed_only: bool = False,
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
) -> str | None:
    """The newest whole checkpoint of a run,
    for ``resume_from_checkpoint``; ``None`` without any.

    Whatever wrote it: ckpt, or the Trainer (with DeepSpeed, FSDP, DDP, or on one GPU),
    Accelerate, Lightning or DeepSpeed alone, in which case it has to prove that it is
    whole, and a line says so; ``committed_only`` takes none of these. ``path`` may be a
    checkpoint too. In a process group every rank calls it and gets the same answer;
    without one it needs no torch. ``verify="data"`` reads every byte.
    ``CheckpointError`` if there are checkpoints and none can be used, or it is not clear
    which of them is of this training.

    Of several of one step, the one of this world size and ZeRO stage is taken, as far
    as these are known: with a process group, and from the configuration that the
    Trainer's arguments or Accelerate hold. One that does not load here is named on
    stderr; ``reshard="auto"`` reshards it beside it, once, and returns that.
    """
    ranks = _process_group("find", timeout)
    fits = None
    if ranks is not None:
        from ckpt.resuming import configured

        fits = configured.fits(ranks)

    checkpoint = select_checkpoint(
        ranks,
        local_path(path),
        thorough=verify,
        fits=fits,
        deepspeed=False,
        committed_only=committed_only,
    )
    if checkpoint is None or (ranks is None and reshard is None):
        return None if checkpoint is None else str(checkpoint.folder)

    from ckpt.resuming import configured

    return str(configured.offer(ranks, checkpoint.folder, reshard))


def _process_group(call: str, timeout: float) -> RankGroup | None:
    """All ranks; ``None`` without a process group, which there is none of without torch."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None

    from ckpt.distributed.ranks import RankGroup

    return RankGroup(call, timeout)


def select_checkpoint(
    ranks: RankGroup | None,
    path: Path,
    tag: str | None = None,
    thorough: VerifyLevel = "structure",
    load_foreign: bool = False,
    fits: TopologyFilter | None = None,
    deepspeed: bool = True,
    committed_only: bool = False,
) -> RunCheckpoint | None:
    """The checkpoint at ``path``, the one of this tag (or name, or step) in the run
    there, or the newest of that run; ``None`` if the run has none yet.

    ``load_foreign`` takes a checkpoint without a manifest that is asked for, though it
    cannot prove to be whole. Among those of one step, one that ``fits`` comes first.
    ``deepspeed``: whether it is DeepSpeed that will load it. ``committed_only`` takes
    none without a manifest.
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
        with _step(ranks):
            _require_nothing(path, [])
        return None

    if kind == "run":
        with _step(ranks):
            is_first = rank_of(ranks) == 0
            offers = Offers(path, fits, deepspeed, committed_only) if is_first else None
        return _newest(ranks, path, offers, thorough == "data")

    folder = path if name is None else path / name
    with _step(ranks) as offer:
        if rank_of(ranks) == 0:
            answer = requested(
                folder,
                tag,
                load_foreign=load_foreign,
                deepspeed=deepspeed,
                committed_only=committed_only,
            )
            _tell_foreign(answer)
            offer.value = Sight.of(answer.checkpoint, _tag_of(answer)).plain()

    _require_sight(ranks, folder, Sight.parse(offer.heard[0]), thorough == "data")
    return candidate(folder)


def _tag_of(offer: Offer) -> str | None:
    """The tag of a checkpoint that no save committed, where its proof says it."""
    return offer.proof.tag if offer.proof is not None else None


def _require_sight(ranks: RankGroup | None, folder: Path, sight: Sight, data: bool) -> None:
    """``CheckpointError`` unless every rank sees the checkpoint that rank 0 sees."""
    with _step(ranks) as objections:
        objections.value = mismatch(ranks, folder, sight, data)
    with _step(ranks):
        for rank, reason in enumerate(objections.heard if rank_of(ranks) == 0 else ()):
            if reason is not None:
                raise CheckpointError(f"rank {rank}: {folder}: {reason}", "incomplete")


def _tell_foreign(offer: Offer) -> None:
    """Logs, once in a process, that a checkpoint is taken which no save committed."""
    folder = offer.checkpoint.folder
    if offer.proof is not None and folder not in _ANNOUNCED:
        _ANNOUNCED.add(folder)
        log.info(
            "%s is complete, not committed (written by %s): going on from it",
            folder,
            offer.proof.kind,
        )


def _newest(
    ranks: RankGroup | None, run: Path, offers: Offers | None, data: bool
) -> RunCheckpoint | None:
    """The newest that all ranks accept; ``offers`` are rank 0's."""
    remaining_offers = iter(offers or ())
    while True:
        with _step(ranks) as offer_step:
            offer = next(remaining_offers, None)
            if offer is not None:
                offer_step.value = Sight.of(offer.checkpoint, _tag_of(offer)).plain()

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
            if offer is not None:
                _tell_foreign(offer)
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
    """``CheckpointError`` if this rank sees a checkpoint
    to resume from that rank 0 does not."""
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
