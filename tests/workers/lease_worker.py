"""One rank of trainings into folders that other jobs have, or take: ``lease_worker.py OUT PART``.

``scene`` runs a training of each front end three times: into a folder that another job has, which
has to be refused before the first step; again when that job was killed; and with another job, of
another machine, that takes the folder over between two saves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ending import leave

from ckpt.runs.lease import lease_file
from ckpt.runs.lease.lease_file import NAME, Holder
from ckpt.runs.lease.processes import ProcessIdentity
from ckpt.runs.run import Run
from converters.errors import CheckpointError

HOLDER = """
import sys, time
from pathlib import Path
from ckpt.runs.lease import lease
held = lease.acquire(Path(sys.argv[1]))
print("has it", flush=True)
time.sleep(600)
"""
At = Callable[[int], None]  # called between two steps, of which the last one saved


def on_first(call: Callable[[], object]) -> None:
    """Something that rank 0 does while the others wait."""
    dist.barrier()
    if not dist.get_rank():
        call()
    dist.barrier()


def files_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run))


class OtherJob:
    """Another training that has the folder, on rank 0."""

    def __init__(self, run: Path):
        self.run, self.pid = run, 0
        on_first(self._start)
        told = [self.pid]
        dist.broadcast_object_list(told, 0)
        self.pid = told[0]

    def _start(self) -> None:
        words = [sys.executable, "-c", HOLDER, str(self.run)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self.process.stdout and self.process.stdout.readline() == "has it\n"

    def kill(self) -> None:
        if not dist.get_rank():
            self.process.kill()
            self.process.communicate()
        dist.barrier()


def take_over(run: Path) -> None:
    """What a job of another machine does that finds the lease and no beat."""
    record = lease_file.read(run / NAME)
    assert record is not None and record.holder is not None
    assert record.holder.process == ProcessIdentity.current(), record
    away = ProcessIdentity("node7", "another boot", 123, 1)
    assert lease_file.remove(run, record)
    assert lease_file.create(run, replace(Holder.current(), process=away))


def said_of(call: Callable[[], object]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it went on")


def scene(run: Path, training: Callable[[At], object], starts_late: bool = False) -> None:
    """``training`` saves after step 2 and step 4; ``starts_late``: it takes the folder then."""
    steps: list[int] = []
    job = OtherJob(run)
    said = said_of(lambda: training(steps.append))
    assert f"{run} is in use: host " in said and f", pid {job.pid} (python -c) has been" in said
    assert "stop it or name another folder" in said
    assert starts_late or not steps, steps
    assert names(run) == [NAME], names(run)
    job.kill()

    def holds(step: int) -> None:
        steps.append(step)
        assert (run / NAME).exists()
        dist.barrier()

    training(holds)
    assert steps[-2:] == [2, 4], steps
    dist.barrier()
    assert (not starts_late and NAME not in names(run)) or starts_late
    before = {path: data for path, data in files_of(run).items() if path != NAME}
    whole = [c.name for c in Run(run).checkpoints() if c.committed]
    assert len(whole) == 2, whole
    on_first(lambda: [path.unlink() for path in run.glob(f"{NAME}*")])

    def taken(step: int) -> None:
        if step == 2:
            on_first(lambda: take_over(run))

    said = said_of(lambda: training(taken))
    assert "another job (host node7, pid 123 (python lease_worker.py), started " in said, said
    assert f"has taken over {run}; what this training saves is not committed" in said, said
    dist.barrier()
    after = files_of(run)
    lost = {path for path in before if path not in after}
    assert not lost, lost
    assert lease_file.read(run / NAME)  # and the other's lease is still there
    dist.barrier()


def saver(out: Path, background: bool) -> None:
    from fixture_specs import Spec
    from live_worker import start, train

    import ckpt

    run = out / f"saver-{background}"

    def training(at: At) -> None:
        engine = start(Spec(2))
        with ckpt.Saver(engine, run, background=background, timeout=60) as saver:
            for step in (2, 4):
                train(engine, 2)
                saver.save(step)
                saver.wait()
                at(step)
        engine.destroy()

    scene(run, training)


def trainer(out: Path, form: str) -> None:
    import transformers as hf
    from hf_worker import make

    from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints

    class Committed(CommittedCheckpoints, hf.Trainer):
        timeout = 60.0

    run = out / form

    def training(at: At) -> None:
        class Calls(hf.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % 2 == 0 and state.global_step:
                    at(state.global_step)

        callbacks: list[Any] = [Calls()]
        callbacks += [CheckpointCallback(timeout=60)] if form == "callback" else []
        kind = Committed if form == "class" else hf.Trainer
        options = {"max_steps": 6, "save_steps": 2, "eval_strategy": "no", "save_total_limit": 2}
        made, _ = make(kind, run, 2, callbacks=callbacks, lr_scheduler_type="constant", **options)
        made.train()

    scene(run, training)


def accelerate(out: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.state import PartialState
    from trainers_worker_accelerate import Training

    from ckpt.trainers.accelerate import save_state

    PartialState._reset_state()
    PartialState(cpu=True, backend="gloo")
    run = out / "accelerate"

    def training(at: At) -> None:
        made = Training(run, 2)
        for step in (2, 4):
            made.steps(2)
            save_state(made.accelerator, run, step=step)
            at(step)
        made.end()

    scene(run, training, starts_late=True)


def fronts(out: Path) -> None:
    saver(out, False)
    saver(out, True)
    trainer(out, "class")
    trainer(out, "callback")
    accelerate(out)


def lightning(out: Path) -> None:
    import warnings

    from lightning.pytorch import Callback
    from trainers_worker_lightning import fit, steps

    warnings.simplefilter("ignore")
    run = out / "lightning"

    def training(at: At) -> None:
        class Calls(Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step in (2, 4):
                    at(trainer.global_step)

        fit(out, 2, 2, [steps(run, save_top_k=2, monitor="step", mode="max"), Calls()])

    scene(run, training)


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    globals()[sys.argv[2]](out)
    (out / f"done{dist.get_rank()}").touch()
    dist.barrier()
    leave()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))
    main()
