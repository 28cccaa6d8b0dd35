"""Before the first step: would the saves to come succeed? Failing here costs seconds, not a day.

What one save takes is asked of the engine, the disk is asked for as much, and every rank writes and
reads back a small file where checkpoints will go.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ckpt.ranks import Ranks
from ckpt.runs.retention import Retention
from ckpt.runs.run import bytes_under
from ckpt.saving import zips
from ckpt.saving.nodes import Nodes
from ckpt.saving.weights import Weights
from converters import files
from converters.errors import CheckpointError

TRIAL = 1 << 20  # bytes of the state that each rank writes and reads back


def predicted(engine: Any, exclude_frozen_parameters: bool = False) -> int:
    """Bytes of this rank's state files, from what the engine would hand over now.

    Without ZeRO some optimizers have no state before their first step; it is not counted then.
    """
    state: dict[str, Any] = {}
    if engine.save_non_zero_checkpoint:
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        without = {id(p) for p in frozen} if exclude_frozen_parameters else set()
        named = engine.module.state_dict(keep_vars=True)
        kept = {name: held for name, held in named.items() if id(held) not in without}
        state["module"] = {
            name: held.detach() if isinstance(held, torch.Tensor) else held
            for name, held in kept.items()
        }
        if engine.zero_optimization_stage() == 3 and not without:
            state["module"][""] = [p.ds_tensor.detach() for p in frozen if hasattr(p, "ds_tensor")]
        if engine.optimizer is not None and not engine.zero_optimization():
            state["module"]["optimizer"] = engine.optimizer.state_dict()
    if engine.save_zero_checkpoint:
        state["optimizer"] = engine.optimizer.state_dict()
    swapped = getattr(getattr(engine.optimizer, "optimizer_swapper", None), "swap_folder", None)
    total = sum(zips.capture(part).size(Path(name)) for name, part in state.items())
    if swapped and os.path.isdir(swapped):
        total += sum(path.stat().st_size for path in Path(swapped).rglob("*") if path.is_file())
    return total


def check(
    engine: Any,
    ranks: Ranks,
    nodes: Nodes,
    run: Path,
    retention: Retention | None,
    weights: Weights | None,
    exclude_frozen_parameters: bool = False,
) -> int:
    """Raises ``CheckpointError`` on every rank if a save would fail; every rank calls it.

    ``engine``: one, or a list of all that are saved together. Returns the bytes of one save, in
    this rank's folder.
    """
    trial = run / f".preflight-{ranks.rank}"
    with ranks.step() as step:
        engines = engine if isinstance(engine, list) else [engine]
        mine = sum(predicted(each, exclude_frozen_parameters) for each in engines)
        try:
            _try(engines[0], trial)
            _ask(trial, mine)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        step.value = [nodes.folder, mine]
    save = shared(ranks, nodes, step.heard, weights)
    with ranks.step():
        if nodes.commits:
            _require_all(run, save, kept(retention))
    return save


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
        for folder, mine in heard if not ranks.rank else ():
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


def _try(engine: Any, trial: Path) -> None:
    """A small part of the model, saved, read back and compared."""
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    part = next((p.detach().reshape(-1) for p in engine.module.parameters() if p.numel()), None)
    part = torch.zeros(1) if part is None else part[: TRIAL // part.element_size()].clone()
    zips.capture({"part": part}).write(trial / "part.pt")
    back = torch.load(trial / "part.pt", weights_only=True, map_location=part.device)["part"]
    if not torch.equal(back.view(torch.uint8), part.view(torch.uint8)):
        raise CheckpointError(
            f"{trial}: what was read back is not what was written; check the disk", "output"
        )


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


def _require_all(run: Path, save: int, count: int) -> None:
    """Raises unless what retention keeps, and the one being made, fit beside what is there."""
    free = files.free_space(run)
    there = bytes_under(run)
    wanted = save * (count + 1)
    if save > free or wanted > free + there:
        raise CheckpointError(
            f"{run} has {free:,} bytes free, and a checkpoint takes {save:,}: for the {count} "
            f"that are kept and the one being made {wanted:,} are needed; make room, keep fewer, "
            "or pass preflight=False",
            "output",
        )
