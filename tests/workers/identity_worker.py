"""One rank of trainings into folders that other trainings have saved into: ``... OUT_DIR``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers as hf
from ending import leave
from hf_worker import make
from live_worker import start, train

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import Spec

import ckpt
from ckpt.runs.run import Run, RunCheckpoint
from ckpt.saving.commit import identity
from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints, ResumeCallback

LIMIT = ckpt.Retention(last=2)


class Committed(CommittedCheckpoints, hf.Trainer):
    timeout = 60.0


def checkpoints(run: Path) -> dict[str, RunCheckpoint]:
    dist.barrier()
    found = {c.name: c for c in Run(run).checkpoints()}
    dist.barrier()
    return found


def saves(found: dict[str, RunCheckpoint]) -> set[str]:
    return {c.manifest.save for c in found.values() if c.manifest}


def runs(found: dict[str, RunCheckpoint], *names: str) -> set[str | None]:
    return {c.manifest.run for n, c in found.items() if n in names and c.manifest}


def another_process() -> None:
    """What this process has saved counts as saved by another."""
    identity._launches.clear()


def scene(run: Path, training: Callable[[int, str | None], Any]) -> None:
    """``training`` saves every second step up to the one it is given, and keeps two."""
    training(8, None)
    old = checkpoints(run)
    assert [*old] == ["checkpoint-6", "checkpoint-8"], [*old]

    another_process()
    training(4, None)
    found = checkpoints(run)
    assert [*found] == [f"checkpoint-{n}" for n in (2, 4, 6, 8)], [*found]
    assert saves(old) < saves(found) and all(c.committed for c in found.values())
    assert runs(found, "checkpoint-2", "checkpoint-4").isdisjoint(runs(old, *old))
    assert (Run(run).target("latest") or "").startswith("checkpoint-4/")

    another_process()
    assert ckpt.find(run) == str(run / "checkpoint-4")
    training(8, ckpt.find(run))
    found = checkpoints(run)
    new = runs(found, "checkpoint-6", "checkpoint-8")
    assert len(new) == 1 and new.isdisjoint(runs(old, *old))
    assert saves(old) < saves(found) and all(c.committed for c in found.values())
    (name,) = runs(old, *old)
    aside = [f"checkpoint-{n}.run-{str(name)[:6]}" for n in (6, 8)]
    assert {*found} == {"checkpoint-6", "checkpoint-8", *aside}, [*found]
    assert ckpt.find(run) == str(run / "checkpoint-8")


def trainer(out: Path, form: str) -> None:
    run = out / form

    def training(steps: int, source: str | None) -> None:
        callbacks: list[Any] = [ResumeCallback()]
        callbacks += [CheckpointCallback(timeout=60)] if form == "callback" else []
        kind = Committed if form == "class" else hf.Trainer
        options = {"max_steps": steps, "save_total_limit": 2, "eval_strategy": "no"}
        made, _ = make(kind, run, 2, callbacks=callbacks, lr_scheduler_type="constant", **options)
        made.train(resume_from_checkpoint=source)

    scene(run, training)


def plain(out: Path) -> None:
    run = out / "plain"

    def training(steps: int, source: str | None) -> None:
        engine = start(Spec(2))
        begun = ckpt.resume(engine, source) if source else 0
        with ckpt.Saver(engine, run, every=2, retention=LIMIT, background=True) as saver:
            for step in range(begun + 1, steps + 1):
                train(engine, 1)
                saver.step(step)
        engine.destroy()

    scene(run, training)


def stock(out: Path) -> None:
    """Loaded by DeepSpeed itself: the run goes on all the same."""
    run = out / "stock"
    engine = start(Spec(2))
    with ckpt.Saver(engine, run) as saver:
        train(engine, 2)
        saver.save(2)
    engine.destroy()

    another_process()
    engine = start(Spec(2))
    assert engine.load_checkpoint(str(run))[0]
    with ckpt.Saver(engine, run) as saver:
        train(engine, 1)
        saver.save(3)
    engine.destroy()
    found = checkpoints(run)
    assert len(runs(found, *found)) == 1 and len(found) == 2


def accelerate(out: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.state import PartialState
    from trainers_worker_accelerate import Training

    from ckpt.trainers.accelerate import load_state, save_state

    PartialState._reset_state()
    PartialState(cpu=True, backend="gloo")
    run = out / "accelerate"

    def training(steps: int, source: str | None) -> None:
        made = Training(run, 2)
        begun = load_state(made.accelerator, source) if source else 0
        for step in range(begun + 2, steps + 1, 2):
            made.steps(2)
            path = save_state(made.accelerator, run, step=step, retention=LIMIT)
            dist.barrier()
            assert path.is_dir(), path
            dist.barrier()
        made.end()

    scene(run, training)


def main() -> None:
    out = Path(sys.argv[1])
    plain(out)
    stock(out)
    trainer(out, "class")
    trainer(out, "callback")
    accelerate(out)
    (out / f"done{dist.get_rank()}").touch()
    dist.barrier()
    leave()


if __name__ == "__main__":
    main()
