"""Which checkpoint a training goes on from: the newest that is whole, the same on every rank.

Rank 0 offers one after the other, the newest first (``offers``), and every rank says whether it
sees the same save (and, where nodes have folders of their own, its node's part of it) until all
accept one. What is passed over is named on stderr, with the reason. Nothing is ever chosen by
default: a run whose checkpoints are all unusable is an error, no fresh start. One that holds
weights alone begins at step 0, and says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from ckpt.ranks import TIMEOUT, Ranks, Step
from ckpt.runs import completeness, liveness
from ckpt.runs import manifest as manifests
from ckpt.runs.lineage import Line
from ckpt.runs.run import (
    POINTERS,
    Checkpoint,
    Run,
    is_checkpoint,
    is_numbered,
    is_run,
    members,
    open_checkpoint,
    require_read,
)
from ckpt.runs.verify import states
from ckpt.saving import configured
from ckpt.saving.agreement import Sight, rank_of, unlike
from ckpt.saving.offers import WEIGHTS_ONLY, Fits, Offers, candidate, require_deepspeed, unusable
from ckpt.saving.topology import Reshard
from converters.errors import CheckpointError

__all__ = ["Fits", "Thorough", "choose", "find"]
Thorough = Literal["structure", "data"]


def find(
    path: str | os.PathLike[str],
    *,
    verify: Thorough = "structure",
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
) -> str | None:
    """The newest whole checkpoint of a run, for ``resume_from_checkpoint``; ``None`` without any.

    Whatever wrote it: ckpt, or the Trainer (with DeepSpeed, FSDP, DDP, or on one GPU), Accelerate,
    Lightning or DeepSpeed alone, in which case it has to prove that it is whole. ``path`` may be a
    checkpoint too. In a process group every rank calls it and gets the same answer;
    ``verify="data"`` reads every byte. ``CheckpointError`` if there are checkpoints and none can
    be used, or it is not clear which of them is of this training.

    Of several of one step, the one of this world size and ZeRO stage is taken, as far as these are
    known: with a process group, and from the configuration that the Trainer's arguments or
    Accelerate hold. One that does not load here is named on stderr; ``reshard="auto"`` reshards it
    beside it, once, and returns that.
    """
    ranks = Ranks("find", timeout) if dist.is_initialized() else None
    found = choose(ranks, Path(path), None, verify, fits=configured.fits(ranks), deepspeed=False)
    return None if found is None else str(configured.offer(ranks, found.folder, reshard))


def choose(
    ranks: Ranks | None,
    path: Path,
    tag: str | None = None,
    thorough: Thorough = "structure",
    load_foreign: bool = False,
    fits: Fits | None = None,
    deepspeed: bool = True,
) -> Checkpoint | None:
    """The checkpoint at ``path``, the one of this tag (or name, or step) in the run there, or the
    newest of that run; ``None`` if the run has none yet.

    ``load_foreign`` takes a checkpoint without a manifest that is asked for, though it cannot prove
    to be whole. Among those of one step, one that ``fits`` comes first. ``deepspeed``: whether it
    is DeepSpeed that will load it.
    """
    path = Path(os.path.abspath(path))
    with _step(ranks) as asked:
        if thorough not in ("structure", "data"):
            raise CheckpointError(f"verify={thorough!r}, expected structure or data", "refused")
        asked.value = _asked(path, tag, fits) if rank_of(ranks) == 0 else None
    kind, name = asked.heard[0]
    if kind == "nothing":
        with _step(ranks) as seen:
            _require_nothing(path, [])
        return None
    if kind == "run":
        return _newest(ranks, path, thorough == "data", fits, deepspeed)
    folder = path if name is None else path / name
    with _step(ranks) as offered:
        if rank_of(ranks) == 0:
            offered.value = _requested(folder, tag, load_foreign, deepspeed).plain()
    sight = Sight.parse(offered.heard[0])
    with _step(ranks) as seen:
        seen.value = unlike(ranks, folder, sight, thorough == "data")
    with _step(ranks):
        for rank, why in enumerate(seen.heard if rank_of(ranks) == 0 else ()):
            if why is not None:
                raise CheckpointError(f"rank {rank}: {folder}: {why}", "incomplete")
    return candidate(folder)


def _asked(path: Path, tag: str | None, fits: Fits | None) -> tuple[str, str | None]:
    """What the caller means: "run", "nothing" or "checkpoint" and its name in ``path``."""
    if not path.is_dir():
        if tag is None and path.is_file() and path.suffix == ".ckpt":
            return "checkpoint", None
        if tag is not None or path.exists() or completeness.is_name(path.name):
            what = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}; expected a checkpoint or a run", "incomplete")
        return "nothing", None
    if not is_run(path) and (is_checkpoint(path) or completeness.has_signs(path)):
        held = open_checkpoint(path).manifest
        known = (path / tag).is_dir() if held is None and tag is not None else True
        if not known or (tag is not None and held is not None and tag != held.tag):
            has = f"its tag is {held.tag}" if held is not None else "it has no such folder"
            raise CheckpointError(f"{path} is no checkpoint of tag {tag}: {has}", "incomplete")
        if tag is None and held is None and _has_other_tags(path):
            return "run", None
        return "checkpoint", None
    if tag is None:
        if completeness.candidates(path):
            return "run", None
        inner = path / "checkpoints"  # where Accelerate and Lightning put them by themselves
        if inner.is_dir() and completeness.candidates(inner):
            raise CheckpointError(
                f"{path} holds no checkpoint itself, {inner} does: name that folder", "incomplete"
            )
        return "nothing", None
    return "checkpoint", _named(path, tag, fits)


def _has_other_tags(path: Path) -> bool:
    """Whether DeepSpeed's ``latest`` names a tag that is not whole, and there are others."""
    tags = [inner for inner in completeness.candidates(path) if is_checkpoint(inner)]
    if is_numbered(path) or len(tags) < 2:
        return False
    try:
        completeness.prove(path)
    except CheckpointError as error:
        require_read(error)
        print(f"ckpt: {path}: {error}", file=sys.stderr, flush=True)
        return True
    return False


def _tags(checkpoint: Checkpoint) -> list[str]:
    """The tag in its manifest, and of several engines the last part, which they have in common."""
    tag = checkpoint.manifest.tag if checkpoint.manifest is not None else None
    return [tag, tag.rpartition("/")[2]] if tag is not None else []


def _named(path: Path, tag: str, fits: Fits | None) -> str:
    """The name of the checkpoint that a tag, name, step or pointer means in a run."""
    run = Run(path)
    if tag in POINTERS:
        return run.find(tag).name
    named = [c for c in run.checkpoints() if tag in (c.name, str(c.step), *_tags(c))]
    if tag not in [c.name for c in named]:  # the engine's state that save_model() left in the run
        named = [c for c in named if c.manifest is not None or is_numbered(c.folder)] or named
        own = members(run.checkpoints())
        named = [c for c in named if c in own] or named
    if len(named) > 1 and fits is not None:  # one may be resharded from the other
        named = [c for c in named if c.manifest is not None and fits(c.manifest)] or named
    if len(named) != 1:
        what = "no checkpoint" if not named else ", ".join(c.name for c in named)
        raise CheckpointError(f"{path} has {what} for {tag}; see ckpt ls {path}", "incomplete")
    return named[0].name


def _requested(folder: Path, tag: str | None, load_foreign: bool, deepspeed: bool) -> Sight:
    """The checkpoint that was asked for, on rank 0.

    ``CheckpointError`` unless it is whole, as far as rank 0 can see without reading every byte.
    """
    found = candidate(folder)
    if found.manifest is None and found.why == manifests.ABSENT:
        within = tag if tag is not None and (folder / tag).is_dir() else None
        if load_foreign and states(folder, within)[1] is None:
            return Sight.of(found)
        proof = liveness.prove_at_rest(folder, within)
        if not proof.resumable:
            raise CheckpointError(f"{folder} cannot be resumed from: {WEIGHTS_ONLY}", "incomplete")
        if deepspeed:
            require_deepspeed(proof)
        print(f"ckpt: {folder} was written without ckpt and is whole", file=sys.stderr, flush=True)
        return Sight.of(found)
    why = unusable(found)
    if why is not None:
        newest = next((c for c in reversed(_of_its_run(found)) if c.unusable is None), None)
        else_ = f"; the newest committed one is {newest.folder}" if newest else ""
        raise CheckpointError(f"{folder} cannot be resumed from: {why}{else_}", "incomplete")
    return Sight.of(found)


def _of_its_run(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The other committed checkpoints of the same run, which an error may offer instead.

    What lies beside a folder may be of another training: the manifests tell. Without one, only what
    is numbered as it is counts.
    """
    folder, held = checkpoint.folder, checkpoint.manifest
    beside = Run(folder.parent).checkpoints()
    if held is not None and held.run is not None:
        return [c for c in members(beside, Line.of(held)) if c.folder != folder]
    if not is_numbered(folder):
        return []
    return [c for c in beside if c.folder != folder and c.manifest and is_numbered(c.folder)]


def _newest(
    ranks: Ranks | None, run: Path, data: bool, fits: Fits | None, deepspeed: bool
) -> Checkpoint | None:
    with _step(ranks):
        offers = Offers(run, fits, deepspeed) if rank_of(ranks) == 0 else None
    waiting = iter(offers or ())
    while True:
        with _step(ranks) as step:
            offer = next(waiting, None)
            if offer is not None:
                step.value = Sight.of(offer.checkpoint).plain()
        if step.heard[0] is None:
            break
        sight = Sight.parse(step.heard[0])
        path = run / sight.name
        with _step(ranks) as answer:
            answer.value = unlike(ranks, path, sight, data)
        with _step(ranks) as verdict:
            whys = [f"rank {r}: {w}" for r, w in enumerate(answer.heard) if w is not None]
            if offers is not None and whys:
                _require_shared(sight, path, whys[0])
                verdict.value = whys[0]
                offers.pass_over(path, whys[0])
        if verdict.heard[0] is None:
            if offer is not None and offer.proof is not None:
                said = f"ckpt: {path} was written without ckpt and is whole: going on from it"
                print(said, file=sys.stderr, flush=True)
            return candidate(path)
    with _step(ranks) as rest:
        if offers is not None:
            offers.require_none_lost()
            rest.value = [checkpoint.name for checkpoint in offers.found]
    with _step(ranks):
        _require_nothing(run, rest.heard[0])
    return None


def _require_shared(sight: Sight, path: Path, why: str) -> None:
    """``CheckpointError`` if a rank does not see a folder that is one for all nodes."""
    if sight.parts == 1 and "does not see" in why:
        raise CheckpointError(
            f"{why}: {path}, which rank 0 sees; name a folder that all ranks share", "incomplete"
        )


def _require_nothing(run: Path, known: list[str]) -> None:
    """``CheckpointError`` if this rank sees a checkpoint to resume from that rank 0 does not."""
    if not run.is_dir() or (is_checkpoint(run) and not is_run(run)):
        return
    there = [c for c in Run(run).checkpoints() if c.unusable is None and c.name not in known]
    if there:
        raise CheckpointError(
            f"this rank sees {there[-1].folder}, rank 0 sees no checkpoint that can be resumed "
            "from; name a folder that all ranks share, or bring back that of node 0",
            "incomplete",
        )


@contextmanager
def _step(ranks: Ranks | None) -> Iterator[Step]:
    """A step of all ranks, or of the only one."""
    if ranks is not None:
        with ranks.step() as step:
            yield step
        return
    step = Step()
    yield step
    step.heard = [step.value]
