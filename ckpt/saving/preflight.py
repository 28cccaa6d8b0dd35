"""Before the first step: would the saves to come succeed? Failing here costs seconds, not a day.

What one save takes is asked of the engine, the disk is asked for as much, and every rank tries what
a save does where checkpoints will go (``trials``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import zero_to_fp32

from ckpt.ranks import Ranks
from ckpt.runs import pruning
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, bytes_under, members
from ckpt.saving import extras, first_step, trials, zips
from ckpt.saving.nodes import Nodes
from ckpt.saving.records import ALIGNMENT
from ckpt.saving.weights import Weights
from converters import files
from converters.errors import CheckpointError

Beside = Callable[[Path, int], object]  # writes what a rank writes beside the states
EXTRA_RECORDS = 5  # of a file of torch.save, beside the pickle and the storages
STOCK = 64  # the alignment of torch.save
log = logging.getLogger("ckpt")


def predicted(
    engine: Any, exclude_frozen_parameters: bool = False, alignment: int = ALIGNMENT
) -> int:
    """Bytes of this rank's state files, from what the engine would hand over now.

    Before the first step, with what the optimizer will keep after it (``first_step``). In the files
    the values begin at multiples of ``alignment``.
    """
    sizes: list[int] = []  # of storages
    total = 0
    with first_step.stepped(engine.optimizer) as ahead:
        state = _states(engine, exclude_frozen_parameters)
        for part in map(zips.capture, state.values()):
            total += len(part.pickle) + zips.record_size(0, alignment) * EXTRA_RECORDS
            sizes += part.sizes
        if "optimizer" in state or "optimizer" in state.get("module", {}):
            sizes += [tensor.nbytes for tensor in ahead]
    if not exclude_frozen_parameters:
        sizes += [held.nbytes for held in _fragments(engine) if not _here(held)]
    return total + sum(zips.record_size(size, alignment) for size in sizes) + _swapped(engine)


def _states(engine: Any, exclude_frozen_parameters: bool) -> dict[str, Any]:
    """What goes into this rank's files, by the kind of file."""
    state: dict[str, Any] = {}
    if engine.save_non_zero_checkpoint:
        frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
        without = frozen if exclude_frozen_parameters else set()
        named = engine.module.state_dict(keep_vars=True)
        state["module"] = {name: _placed(p) for name, p in named.items() if name not in without}
        if not exclude_frozen_parameters:
            state["module"][""] = [held for held in _fragments(engine) if _here(held)]
        if engine.optimizer is not None and not engine.zero_optimization():
            state["module"]["optimizer"] = engine.optimizer.state_dict()
    if engine.save_zero_checkpoint:
        state["optimizer"] = engine.optimizer.state_dict()
    return state


def _placed(held: Any) -> Any:
    """An entry of the module's state as DeepSpeed saves it: ZeRO-3's parameters without values."""
    if hasattr(held, "ds_tensor"):
        return torch.empty(0, dtype=held.dtype)
    return held.detach() if isinstance(held, torch.Tensor) else held


def _fragments(engine: Any) -> list[torch.Tensor]:
    """What DeepSpeed saves of frozen parameters once more: this rank's part, in host memory."""
    if not engine.save_non_zero_checkpoint or engine.zero_optimization_stage() < 2:
        return []
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in frozen]


def _here(tensor: torch.Tensor) -> bool:
    """Whether it is in host memory already, so that a copy to it is no other storage."""
    return tensor.device.type == "cpu"


def _swapped(engine: Any) -> int:
    """Bytes of the swap folder, which DeepSpeed copies into a checkpoint under NVMe offload."""
    folder = getattr(getattr(engine.optimizer, "optimizer_swapper", None), "swap_folder", None)
    if not folder or not os.path.isdir(folder):
        return 0
    inner = engine.optimizer.optimizer
    ahead = 1.0 if any(inner.state.values()) else first_step.growth(inner)
    return int(ahead * bytes_under(Path(folder)))


def check(
    engine: Any,
    ranks: Ranks,
    nodes: Nodes,
    run: Path,
    retention: Retention | None,
    weights: Weights | None,
    exclude_frozen_parameters: bool = False,
    beside: Beside | None = None,
    full: bool = True,
    alignment: int = ALIGNMENT,
    line: Line | None = None,
) -> int:
    """Raises ``CheckpointError`` on every rank if a save would fail; every rank calls it.

    ``engine``: one, or a list of all that are saved together. ``beside`` writes what lies beside
    the states. Without ``full`` saves have no states, else their files have this ``alignment``.
    ``line``: whose checkpoints go when new ones come; those of other runs stay where they are.
    Returns the bytes of one save, in this rank's folder.
    """
    engines = engine if isinstance(engine, list) else [engine]
    with ExitStack() as stack:
        with ranks.step() as step:
            without = exclude_frozen_parameters
            states = [predicted(each, without, alignment) for each in engines if full]
            trial = stack.enter_context(trials.opened(run, ranks.rank))
            place = trials.examine(trial, engines[0].module.parameters())
            mine = sum(states) + _small(trial, ranks.rank, beside, full)
            scripts = [each for each in engines if each.save_zero_checkpoint and not ranks.rank]
            if full:  # DeepSpeed copies it beside the states of each
                mine += len(scripts) * os.path.getsize(zero_to_fp32.__file__)
            _ask(trial, mine)
            step.value = [nodes.folder, mine, trial.name, place.part]
        with ranks.step():
            seen = [(r, n, size) for r, (folder, _, n, size) in enumerate(step.heard) if not folder]
            if not ranks.rank:
                trials.require_seen(run, seen)
    if nodes.commits:
        for lack in place.lacks():
            log.warning("%s: this filesystem %s", run, lack)
    save = shared(ranks, nodes, step.heard, weights)
    with ranks.step():
        if nodes.commits:
            _require_all(run, save, kept(retention), line)
    return save


def _small(trial: Path, rank: int, beside: Beside | None, full: bool) -> int:
    """Bytes of what lies beside the states: random states, configuration, tokenizer."""
    folder = trial / "beside"
    folder.mkdir()
    if full:
        extras.write(folder, rank, None)
    if beside is not None:
        beside(folder, rank)
    return bytes_under(folder)


def require_room(
    ranks: Ranks, nodes: Nodes, folder: Path, heard: list[Any], weights: Weights | None
) -> None:
    """Raises on every rank unless the disk has room for what all are about to write.

    ``heard`` on rank 0: every rank's folder and bytes.
    """
    save = shared(ranks, nodes, heard, weights)
    with ranks.step():
        free = files.free_space(folder)
        if nodes.commits and save > free:
            raise CheckpointError(
                f"{folder.parent} has {free:,} bytes free, this checkpoint takes {save:,}; make "
                "room, or keep fewer",
                "output",
            )


def shared(ranks: Ranks, nodes: Nodes, heard: list[Any], weights: Weights | None) -> int:
    """Bytes that all ranks of this rank's folder write."""
    with ranks.step() as told:
        sums = [0] * nodes.parts
        for folder, mine, *_ in heard if not ranks.rank else ():
            sums[folder] += mine
        sums[0] += weights.nbytes if weights else 0
        told.value = sums
    return int(told.heard[0][nodes.folder])


def kept(retention: Retention | None) -> int:
    """Checkpoints that a run keeps at least, by its rules; what ``every`` adds has no bound."""
    if retention is None:
        return 1
    best = retention.best[2] if retention.best else 0
    return max(1, (retention.last or 1) + best)


def _ask(trial: Path, nbytes: int) -> None:
    """Asks the disk for as many bytes, which finds quotas too, and gives them back."""
    path = trial / "room"
    try:
        files.reserve(path, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"{trial.parent}: {error.strerror}: this rank's part of one checkpoint takes "
            f"{nbytes:,} bytes; make room, or name another folder",
            "output",
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _require_all(run: Path, save: int, count: int, line: Line | None) -> None:
    """Raises unless what retention keeps, and the one being made, fit beside what is there."""
    free = files.free_space(run)
    there = sum(c.nbytes for c in pruning.originals(members(Run(run).checkpoints(), line)))
    wanted = save * (count + 1)
    if save > free or wanted > free + there:
        raise CheckpointError(
            f"{run} has {free:,} bytes free, and a checkpoint takes {save:,}: for the {count} "
            f"that are kept and the one being made {wanted:,} are needed; make room, keep fewer, "
            "or pass preflight=False",
            "output",
        )
