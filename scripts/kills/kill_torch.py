"""Ways to train with FSDP2, save and resume: with ckpt, and with torch's own ``dcp.save``.

Each trains the GPT-2 of ``kill_fronts`` up to a step, and keeps only the newest checkpoint. Those
without ckpt resume as the users of such loops do: from the folder of the highest number (``dcp``,
torch's tutorials), or from the highest that has a ``.metadata`` (``dcp-metadata``, torchtitan 0.3
``components/checkpoint.py``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from kill_fronts import EVERY, Front, Task, Trained, model, rows_of
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt.runs.manifest import check
from ckpt.runs.run import Run
from converters import detect

PATIENCE = 30.0  # seconds without a sign of life until a rank counts as absent
KEEP = ckpt.Retention(last=1)
Loop = tuple[Any, torch.optim.Optimizer]


def fsdp_loop() -> Loop:
    """A model and an optimizer, sharded over all ranks."""
    made: Any = model()
    for block in made.transformer.h:
        fully_shard(block)
    fully_shard(made)
    torch.manual_seed(int(os.environ["RANK"]))
    return made, torch.optim.AdamW(made.parameters(), lr=1e-3)


def train_step(loop: Loop, step: int) -> None:
    """One step."""
    ids = rows_of(step)
    loop[1].zero_grad()
    loop[0](input_ids=ids, labels=ids).loss.backward()
    loop[1].step()


def digest(loop: Loop, step: int) -> str:
    """A digest of this rank's part of the weights, of the optimizer's state and random numbers."""
    seen = hashlib.sha256()
    values = [*loop[0].parameters()]
    values += [value for state in loop[1].state.values() for value in state.values()]
    for value in values:
        part = value.to_local() if hasattr(value, "to_local") else value
        seen.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    seen.update(f"{step} {torch.rand(1)}".encode())
    return seen.hexdigest()[:16]


def require_whole(run: Path, least: int) -> None:
    """Fails unless the newest is of step ``least`` or later, and every byte of all is right."""
    if os.environ["RANK"] != "0":
        return
    newest = Run(run).newest()
    if newest is None or (newest.step or 0) < least:
        raise RuntimeError(f"the newest committed checkpoint is {newest}, expected step {least}")
    for checkpoint in Run(run).checkpoints():
        if checkpoint.manifest is not None:
            if problems := check(checkpoint.folder, checkpoint.manifest, data=True):
                raise RuntimeError(f"{checkpoint.name}: {problems}")
            detect.read(checkpoint.folder, complete=True)


def committed(background: bool, task: Task) -> Trained:
    """A loop with ``ckpt.Saver`` and ``ckpt.resume``."""
    loop, start = fsdp_loop(), 0
    parts: dict[str, Any] = {"model": loop[0], "optimizer": loop[1], "run": task.out}
    if task.resume:
        require_whole(task.out, EVERY)
        start = ckpt.resume(**parts, timeout=PATIENCE)
    saver = ckpt.Saver(**parts, retention=KEEP, background=background, timeout=PATIENCE)
    for step in range(start + 1, task.last + 1):
        train_step(loop, step)
        if step % EVERY == 0:
            saver.wait()  # the save before is to be committed undisturbed
            task.before_save(step)
            saver.save(step)
    trained = Trained(start, digest(loop, task.last))
    if background and task.armed:  # the save goes on while the training does
        train_step(loop, task.last + 1)
        saver.step(task.last + 1)
    saver.close()
    if task.resume:
        require_whole(task.out, task.last)
    return trained


def with_dcp(newest: Callable[[Path], Path], task: Task) -> Trained:
    """A loop with ``dcp.save`` and ``dcp.load``, which deletes the checkpoint before the last."""
    loop, start, rank = fsdp_loop(), 0, int(os.environ["RANK"])
    if task.resume:
        source = newest(task.out)
        train_step(loop, 0)  # or else the optimizer has no state to load into
        states = states_of(loop)
        dcp.load(states, checkpoint_id=source)
        state_dicts.set_state_dict(
            *loop, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        torch.set_rng_state(states[f"rng{rank}"])
        start = int(source.name.rpartition("-")[2])
    for step in range(start + 1, task.last + 1):
        train_step(loop, step)
        if step % EVERY == 0:
            task.before_save(step)
            dcp.save(states_of(loop), checkpoint_id=task.out / f"checkpoint-{step}")
            if rank == 0:
                shutil.rmtree(task.out / f"checkpoint-{step - EVERY}", ignore_errors=True)
            dist.barrier()
    return Trained(start, digest(loop, task.last))


def states_of(loop: Loop) -> dict[str, Any]:
    """What is saved and loaded."""
    of_model, of_optimizer = state_dicts.get_state_dict(*loop)
    random_state = {f"rng{os.environ['RANK']}": torch.get_rng_state()}
    return {"model": of_model, "optimizer": of_optimizer, **random_state}


def highest(run: Path) -> Path:
    """The folder of the highest number."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def highest_described(run: Path) -> Path:
    """The highest that has a ``.metadata``."""
    folders = [path for path in run.glob("checkpoint-*") if (path / ".metadata").is_file()]
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]))


FRONTS: dict[str, Front] = {
    "torch-saver": partial(committed, False),
    "torch-background": partial(committed, True),
    "dcp": partial(with_dcp, highest),
    "dcp-metadata": partial(with_dcp, highest_described),
}
