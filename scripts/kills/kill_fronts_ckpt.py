"""The ways to train, save and resume that ckpt offers, as those of ``kill_fronts``.

Each keeps only the newest checkpoint, so that the save of step 4 also deletes that of step 2, and
writes weights too. Before it resumes, and after its last save, what is there is checked: the newest
committed checkpoint, the one that ``latest`` names, every byte of all that are committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from kill_fronts import (
    EVERY,
    Front,
    Task,
    Trained,
    config,
    digest,
    engine_of,
    model,
    run_trainer,
    train_step,
    trainer_of,
)

import ckpt
from ckpt.runs.manifest import check
from ckpt.runs.run import Run
from ckpt.state import plain, rng
from converters import detect

PATIENCE = 3.0  # seconds without a sign of life until a rank counts as absent
KEEP = ckpt.Retention(last=1)


def require_whole(run: Path, least: int) -> None:
    """Fails unless a checkpoint of step ``least`` or later is committed, and all that are hold.

    Every byte of them is checked, as `ckpt verify --data` does, and every header is read.
    """
    if os.environ["RANK"] != "0":
        return
    held = Run(run)
    newest, named = held.newest(), held.pointer()
    if newest is None or (newest.step or 0) < least:
        raise RuntimeError(f"the newest committed checkpoint is {newest}, expected step {least}")
    if named is None or not named.committed:
        raise RuntimeError(f"latest holds {held.target()!r}: {named}")
    for checkpoint in held.checkpoints():
        if checkpoint.manifest is not None:
            problems = check(checkpoint.folder, checkpoint.manifest, data=True)
            if problems:
                raise RuntimeError(f"{checkpoint.name}: {problems}")
            detect.read(checkpoint.folder, complete=True)


def newest_in(task: Task) -> Path:
    """What ``ckpt latest`` prints."""
    newest = Run(task.out).newest()
    if newest is None:
        raise RuntimeError(f"{task.out} has no committed checkpoint")
    return newest.folder


class Training(NamedTuple):
    """What a loop trains: how its engine is made, and one step of it."""

    engine_of: Callable[[Task], Any]
    train_step: Callable[[Any, int], None]


TINY_GPT2 = Training(engine_of, train_step)


def saver_loop(
    task: Task,
    background: bool,
    resume: Callable[[Task, Any], int],
    before_save: Callable[[int], None],
    training: Training = TINY_GPT2,
) -> Trained:
    """A loop around a DeepSpeed engine and ``ckpt.Saver``, keeping only the newest checkpoint.

    ``resume`` loads a checkpoint into the engine and returns its step.
    """
    if task.resume:
        require_whole(task.out, EVERY)
    engine, start = training.engine_of(task), 0
    train_step = training.train_step
    saver = ckpt.Saver(
        engine,
        task.out,
        retention=KEEP,
        weights="bf16",
        background=background,
        timeout=PATIENCE,
    )
    if task.resume:
        start = resume(task, engine)
    else:
        torch.manual_seed(int(os.environ["RANK"]))
    for step in range(start + 1, task.last + 1):
        train_step(engine, step)
        if step % EVERY == 0:
            saver.wait()  # the save before is to be committed undisturbed
            before_save(step)
            saver.save(step)
    made = Trained(start, digest(engine))
    if background and task.armed:  # the save goes on while the training does
        train_step(engine, task.last + 1)
        saver.step(task.last + 1)
    saver.close()
    if task.resume:
        require_whole(task.out, task.last)
    return made


def committed_loop(background: bool, task: Task, training: Training = TINY_GPT2) -> Trained:
    """The loop as DeepSpeed itself resumes it, with the random states from their files."""
    return saver_loop(task, background, _load_newest, task.before_save, training)


def parallel_loop(name: str, background: bool, task: Task) -> Trained:
    """The loop around an engine with tensor or pipeline parallelism or experts, for ckpt.resume."""
    import kill_parallel

    training = Training(*kill_parallel.TRAININGS[name])
    return saver_loop(task, background, _resume_newest, task.before_save, training)


def _resume_newest(task: Task, engine: Any) -> int:
    return ckpt.resume(engine, task.out)


def _load_newest(task: Task, engine: Any) -> int:
    newest = newest_in(task)
    engine.load_checkpoint(str(newest))
    rng.restore(plain.loads(newest / rng.NAME.format(os.environ["RANK"])))
    return int(engine.global_steps)


def accelerated(task: Task) -> Trained:
    """A loop around Accelerate, which saves by ``ckpt.trainers.accelerate`` and loads by itself."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    from ckpt.trainers.accelerate import save_state

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=True, backend="gloo")
    plugin = DeepSpeedPlugin(hf_ds_config=config(task.stage))
    accelerator, start = Accelerator(deepspeed_plugin=plugin), 0
    engine = accelerator.prepare(model())
    if task.resume:
        require_whole(task.out, EVERY)
        accelerator.load_state(str(newest_in(task)))
        start = engine.global_steps
    else:
        torch.manual_seed(int(os.environ["RANK"]))
    for step in range(start + 1, task.last + 1):
        train_step(engine, step)
        if step % EVERY == 0:
            task.before_save(step)
            save_state(accelerator, task.out, retention=KEEP, weights="bf16", timeout=PATIENCE)
    if task.resume:
        require_whole(task.out, task.last)
    return Trained(start, digest(engine))


def lightning(task: Task) -> Trained:
    """Lightning with ``ckpt.trainers.lightning``; a ModelCheckpoint keeps the last one."""
    import kill_lightning

    if task.resume:
        require_whole(task.out, EVERY)
    made = kill_lightning.fit(task, newest_in(task) if task.resume else None, PATIENCE)
    if task.resume:
        require_whole(task.out, task.last)
    return made


def hf_mixin(task: Task) -> Trained:
    """A Trainer with ``CommittedCheckpoints``, which resumes as every Trainer does."""
    from ckpt.trainers.hf import CommittedCheckpoints

    class Committed(CommittedCheckpoints):
        retention, timeout = KEEP, PATIENCE

    return hf(task, trainer_of(task, Committed), True)


def hf_callback(task: Task) -> Trained:
    """A Trainer with ``CheckpointCallback``, which resumes from what ``ckpt latest`` prints."""
    from ckpt.trainers.hf import CheckpointCallback

    committing = CheckpointCallback(retention=KEEP, timeout=PATIENCE)
    trainer = trainer_of(task, transformers.Trainer, callbacks=[committing])
    return hf(task, trainer, str(newest_in(task)) if task.resume else None)


def hf(task: Task, trainer: transformers.Trainer, source: str | bool | None) -> Trained:
    """Trains with a Trainer that commits."""
    if task.resume:
        require_whole(task.out, EVERY)
    made = run_trainer(task, trainer, source if task.resume else None)
    if task.resume:
        require_whole(task.out, task.last)
    return made


FRONTS: dict[str, Front] = {
    "saver": partial(committed_loop, False),
    "saver-background": partial(committed_loop, True),
    "saver-tensor": partial(parallel_loop, "tensor", False),
    "saver-pipeline": partial(parallel_loop, "pipeline", True),
    "saver-experts": partial(parallel_loop, "experts", True),
    "accelerate": accelerated,
    "hf-mixin": hf_mixin,
    "hf-callback": hf_callback,
    "lightning": lightning,
}
