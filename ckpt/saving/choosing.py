"""Which checkpoint a training goes on from: the newest that is whole, the same on every rank.

Rank 0 offers one after the other, the newest first, and every rank says whether it sees the same
save (and, where nodes have folders of their own, its node's part of it) until all accept one. What
is passed over is named on stderr, with the reason. Nothing is ever chosen by default: a run whose
checkpoints are all unusable is an error, no fresh start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from ckpt.ranks import TIMEOUT, Ranks, Step
from ckpt.runs import manifest as manifests
from ckpt.runs.run import POINTERS, Checkpoint, Run, is_checkpoint, is_numbered, open_checkpoint
from ckpt.runs.verify import states, verify
from ckpt.saving import configured
from ckpt.saving.candidates import Fits, candidates
from ckpt.saving.topology import Reshard
from converters import files
from converters.errors import CheckpointError

Thorough = Literal["structure", "data"]


def find(
    path: str | os.PathLike[str],
    *,
    verify: Thorough = "structure",
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
) -> str | None:
    """The newest whole checkpoint of a run, for ``resume_from_checkpoint``; ``None`` without one.

    ``path`` may be a checkpoint too, which then has to be whole. In a process group every rank
    calls it and gets the same answer; ``verify="data"`` reads every byte. ``CheckpointError`` if
    there are checkpoints and none can be used.

    Of several of one step, the one of this world size and ZeRO stage is taken, as far as these are
    known: with a process group, and from the configuration that the Trainer's arguments or
    Accelerate hold. One that does not load here is named on stderr; ``reshard="auto"`` reshards it
    beside it, once, and returns that.
    """
    ranks = Ranks("find", timeout) if dist.is_initialized() else None
    found = choose(ranks, Path(path), None, verify, fits=configured.fits(ranks))
    return None if found is None else str(configured.offer(ranks, found.folder, reshard))


def choose(
    ranks: Ranks | None,
    path: Path,
    tag: str | None = None,
    thorough: Thorough = "structure",
    load_foreign: bool = False,
    fits: Fits | None = None,
) -> Checkpoint | None:
    """The checkpoint at ``path``, the one of this tag (or name, or step) in the run there, or the
    newest of that run; ``None`` if the run has none yet.

    ``load_foreign`` takes a checkpoint without a manifest if it is asked for. Among those of one
    step, one that ``fits`` comes first.
    """
    path = Path(os.path.abspath(path))
    with _step(ranks) as asked:
        if thorough not in ("structure", "data"):
            raise CheckpointError(f"verify={thorough!r}, expected structure or data", "refused")
        asked.value = _asked(path, tag, fits) if _rank(ranks) == 0 else None
    kind, name = asked.heard[0]
    if kind == "nothing":
        with _step(ranks) as seen:
            _require_nothing(path)
        return None
    if kind == "run":
        return _newest(ranks, path, thorough == "data", fits)
    folder = path if name is None else path / name
    with _step(ranks) as offered:
        if _rank(ranks) == 0:
            offered.value = _requested(folder, load_foreign)
    save = offered.heard[0]
    with _step(ranks) as seen:
        seen.value = _unlike(ranks, folder, save, thorough == "data")
    with _step(ranks):
        for rank, why in enumerate(seen.heard if _rank(ranks) == 0 else ()):
            if why is not None:
                raise CheckpointError(f"rank {rank}: {folder}: {why}", "incomplete")
    return open_checkpoint(folder)


def _asked(path: Path, tag: str | None, fits: Fits | None) -> tuple[str, str | None]:
    """What the caller means: "run", "nothing" or "checkpoint" and its name in ``path``."""
    if not path.is_dir():
        beside = Run(path.parent).checkpoints() if path.parent.is_dir() else []
        among = any(c.manifest is not None for c in beside)
        if tag is not None or path.exists() or is_numbered(path) or among:
            what = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}; expected a checkpoint or a run", "incomplete")
        return "nothing", None
    held = open_checkpoint(path).manifest
    inner = [] if held is not None else [c for c in Run(path).checkpoints() if c.manifest]
    if is_checkpoint(path) and not inner:  # or it is a run that DeepSpeed saved into before
        known = (path / tag).is_dir() if held is None and tag is not None else True
        if not known or (tag is not None and held is not None and tag != held.tag):
            has = f"its tag is {held.tag}" if held is not None else "it has no such folder"
            raise CheckpointError(f"{path} is no checkpoint of tag {tag}: {has}", "incomplete")
        return "checkpoint", None
    run = Run(path)
    if tag is None:
        return ("run" if run.checkpoints() else "nothing"), None
    if tag in POINTERS:
        return "checkpoint", run.find(tag).name
    named = [
        c
        for c in run.checkpoints()
        if tag in (c.name, str(c.step)) or (c.manifest is not None and tag == c.manifest.tag)
    ]
    if len(named) > 1 and fits is not None:  # one may be resharded from the other
        named = [c for c in named if c.manifest is not None and fits(c.manifest)] or named
    if len(named) != 1:
        what = "no checkpoint" if not named else ", ".join(c.name for c in named)
        raise CheckpointError(f"{path} has {what} for {tag}; see ckpt ls {path}", "incomplete")
    return "checkpoint", named[0].name


def _requested(folder: Path, load_foreign: bool) -> str | None:
    """The save that a checkpoint which was asked for is of, on rank 0; ``None``: of no known one.

    ``CheckpointError`` unless it is whole, as far as rank 0 can see without reading every byte.
    """
    found = open_checkpoint(folder)
    if found.manifest is None and found.why == manifests.ABSENT and load_foreign:
        _, wrong = states(folder)
        if wrong:
            raise CheckpointError(f"{folder} is not whole: {wrong}", "incomplete")
        return None
    why = _unusable(found)
    if why is not None:
        others = [c for c in Run(folder.parent).checkpoints() if c.folder != folder]
        newest = next((c for c in reversed(others) if c.unusable is None), None)
        else_ = f"; the newest committed one is {newest.folder}" if newest else ""
        how = "; load_foreign=True loads it all the same" if found.why == manifests.ABSENT else ""
        raise CheckpointError(f"{folder} cannot be resumed from: {why}{else_}{how}", "incomplete")
    assert found.manifest is not None
    return found.manifest.save


def _unusable(checkpoint: Checkpoint) -> str | None:
    """Why training cannot go on from it; ``None`` if it can."""
    if checkpoint.unusable is not None:
        return checkpoint.unusable
    try:
        problems = verify(checkpoint).problems
    except CheckpointError as error:
        return str(error)
    return problems[0] if problems else None


def _unlike(ranks: Ranks | None, folder: Path, save: str | None, data: bool) -> str | None:
    """Why this rank cannot take what rank 0 offers, a save; ``None`` if it can.

    ``CheckpointError`` if the folder is one for all nodes, but not seen by this rank.
    """
    if save is None:
        return None if files.appears(folder) else "this rank does not see it"
    if not files.appears(folder / manifests.NAME):
        return "this rank does not see it"
    try:
        held = manifests.read(folder)
    except CheckpointError as error:
        return str(error)
    if held.save != save:
        return f"on this rank it is another save, {held.save}, than on rank 0, {save}"
    if held.nodes > 1:
        problems = manifests.check(folder, held)
        if problems:
            return problems[0]
    if not data:
        return None
    rank, world = _rank(ranks), ranks.world if ranks else 1
    if held.nodes > 1:  # each node reads its own part
        rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mine = {n: f for i, (n, f) in enumerate(held.files.items()) if i % world == rank}
    beat = (lambda _: ranks.beat(heed=True)) if ranks else (lambda _: None)
    problems = manifests.check(folder, replace(held, files=mine), True, beat)
    return problems[0] if problems else None


def _newest(ranks: Ranks | None, run: Path, data: bool, fits: Fits | None) -> Checkpoint | None:
    passed: list[tuple[str, str]] = []
    offers = _offers(run, passed, fits) if _rank(ranks) == 0 else iter(())
    while True:
        with _step(ranks) as step:
            offer = next(offers, None)
            if offer is not None and offer.manifest is not None:
                held = offer.manifest
                step.value = [offer.name, held.save, held.nodes]
        if step.heard[0] is None:
            break
        name, save, parts = step.heard[0]
        with _step(ranks) as answer:
            answer.value = _unlike(ranks, run / name, save, data)
        with _step(ranks) as verdict:
            whys = [f"rank {r}: {w}" for r, w in enumerate(answer.heard) if w is not None]
            if _rank(ranks) == 0 and whys:
                if parts == 1 and "does not see" in whys[0]:
                    raise CheckpointError(
                        f"{whys[0]}: {run / name}, which rank 0 sees; name a folder that all ranks "
                        "share",
                        "incomplete",
                    )
                verdict.value = whys[0]
                _pass_over(passed, run / name, whys[0])
        if verdict.heard[0] is None:
            return open_checkpoint(run / name)
    with _step(ranks):
        if _rank(ranks) == 0:
            _require_none_lost(run, passed)
        else:
            _require_nothing(run)
    return None


def _offers(run: Path, passed: list[tuple[str, str]], fits: Fits | None) -> Iterator[Checkpoint]:
    """The checkpoints that can be resumed from, the newest first; says why others cannot."""
    offered = candidates(run, fits)
    offered.tell()
    for checkpoint in offered.newest_first:
        why = _unusable(checkpoint)
        if why is None:
            yield checkpoint
        else:
            _pass_over(passed, checkpoint.folder, why)
    usable = [c for c in offered.others if c.unusable is None]
    if usable:
        raise CheckpointError(
            f"{run}: nothing of the run that saved last can be resumed from, but there is "
            f"{offered.described()}: pass {usable[-1].folder} to go on from that, or name another "
            "folder to start anew",
            "incomplete",
        )


def _pass_over(passed: list[tuple[str, str]], folder: Path, why: str) -> None:
    passed.append((str(folder), why))
    print(f"ckpt: passed over {folder}: {why}", file=sys.stderr, flush=True)


def _require_none_lost(run: Path, passed: list[tuple[str, str]]) -> None:
    """``CheckpointError`` if a training has been here whose work a fresh start would forget."""
    for folder, why in passed:
        held = open_checkpoint(Path(folder))
        if why == manifests.ABSENT and states(Path(folder))[1] is None:
            raise CheckpointError(
                f"{folder} has no manifest.json, but its state files are complete: commit it with "
                f"ckpt doctor {run} --adopt, or name it and pass load_foreign=True; to start anew, "
                "name another folder",
                "incomplete",
            )
        if why != manifests.ABSENT and (held.manifest is None or held.tier == "full"):
            raise CheckpointError(
                f"{run} has checkpoints, but none that can be resumed from ({folder}: {why}); see "
                f"ckpt doctor {run}, or name another folder to start anew",
                "incomplete",
            )


def _require_nothing(run: Path) -> None:
    """``CheckpointError`` if rank 0 sees no checkpoint and this rank does."""
    there = [c for c in Run(run).checkpoints() if c.committed] if run.is_dir() else []
    if there and not is_checkpoint(run):
        raise CheckpointError(
            f"this rank sees {there[-1].folder}, rank 0 sees no checkpoint that can be resumed "
            "from; name a folder that all ranks share, or bring back that of node 0",
            "incomplete",
        )


def _rank(ranks: Ranks | None) -> int:
    return ranks.rank if ranks is not None else 0


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
