"""One rank of a training with Accelerate: ``trainers_worker_accelerate.py OUT_DIR PART STAGES``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, ProjectConfiguration
from ending import leave
from fixture_specs import tiny_llama

from ckpt import live
from ckpt.runs.lease.lease_file import NAME
from ckpt.runs.retention import Retention
from ckpt.trainers.accelerate import save_state
from converters.errors import CheckpointError


class Counter:
    """An object of the user's, registered with the accelerator; fails when it is told to."""

    def __init__(self) -> None:
        self.count, self.fails = 0, ""

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "raises" and dist.get_rank() == 1:
            raise RuntimeError("no state today")
        if self.fails == "dies" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Training:
    """A tiny Llama with dropout and tied embeddings, and a counter, the same at every start."""

    def __init__(self, out: Path, stage: int, bf16: bool = True) -> None:
        AcceleratorState._reset_state()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": bf16},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
            "zero_force_ds_cpu_optimizer": False,
        }
        self.accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            project_config=ProjectConfiguration(
                str(out), automatic_checkpoint_naming=True, total_limit=1
            ),
        )
        torch.manual_seed(7)
        llama = tiny_llama(attention_dropout=0.3, tie_word_embeddings=True)
        llama.num_hidden_layers = 1
        model = hf.AutoModelForCausalLM.from_config(llama)
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)
        self.engine = self.accelerator.prepare(model)
        torch.manual_seed(100 + dist.get_rank())

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            rows = torch.randint(64, (2, 8))
            loss = self.engine(input_ids=rows, labels=rows).loss
            self.accelerator.backward(loss)  # DeepSpeed's engine takes the step in it
            losses.append(loss.item())
            self.counter.count += 1
        return losses

    def end(self) -> None:
        self.accelerator.free_memory()


def everything(folder: Path) -> dict[str, bytes]:
    """The bytes of all files under a folder, but for the lease, whose beat goes on."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != NAME]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def failing(training: Training, out: Path) -> str:
    """A save in which rank 1 fails: told on all ranks, and nothing has changed."""
    before = everything(out)
    dist.barrier()
    training.counter.fails = "raises"
    try:
        save_state(training.accelerator, out)
    except CheckpointError as error:
        told = str(error)
    training.counter.fails = ""
    dist.barrier()
    assert everything(out) == before
    assert not [path.name for path in out.iterdir() if path.name.endswith(".saving")]
    dist.barrier()
    return told


def saves(out: Path, *stages: int) -> None:
    """Each stage: undisturbed, with saves, and loaded by stock Accelerate and DeepSpeed."""
    for stage in stages:
        folder = out / f"zero{stage}-w{dist.get_world_size()}"
        run = folder / "out"
        training = Training(folder / "alone", stage)
        undisturbed = training.steps(6)
        training.end()

        training = Training(folder / "project", stage)
        configuration = training.accelerator.project_configuration
        before = dict(vars(configuration))
        losses = training.steps(2)
        extra = {"mine": training.counter}
        path = save_state(training.accelerator, run, metrics={"loss": losses[-1]}, extra=extra)
        assert path == run / "checkpoint-2"
        losses += training.steps(1)
        told = failing(training, run)
        losses += training.steps(1)
        path = save_state(training.accelerator, run, step=40, weights="bf16", max_shard_size=100)
        dist.barrier()
        assert vars(configuration) == before, vars(configuration)
        live.save_fp32(training.engine, folder / "live")
        training.accelerator.save_state()  # stock, by its own naming
        losses += training.steps(2)
        assert losses == undisturbed, (losses, undisturbed)
        training.end()

        for saved, at in ((run / "checkpoint-2", 2), (path, 4)):
            training = Training(folder / "again", stage)
            training.accelerator.load_state(str(saved))
            assert training.counter.count == at
            again = training.steps(6 - at)
            assert again == undisturbed[at:], (at, again, undisturbed)
            training.end()
        training = Training(folder / "again", stage)
        loaded, _ = training.engine.load_checkpoint(str(run))  # DeepSpeed alone, by our latest
        assert loaded is not None and training.engine.global_steps == 4
        live.save_fp32(training.engine, folder / "loaded")
        training.end()
        (folder / f"told{dist.get_rank()}.json").write_text(json.dumps(told))
    if 2 in stages:
        keeping(out / "kept")


def keeping(run: Path) -> None:
    """Retention: the newest, and the best by a metric."""
    training = Training(run, 2)
    rule = Retention(last=1, best=("loss", "min", 1))
    for loss in (3.0, 1.0, 2.0, float("nan")):
        training.steps(1)
        save_state(training.accelerator, run, metrics={"loss": loss}, retention=rule)
    training.end()


def dies(out: Path, stage: int) -> None:
    """Rank 1 is killed in the middle of the second save."""
    training = Training(out, stage)
    training.steps(1)
    save_state(training.accelerator, out / "out")
    training.steps(1)
    training.counter.fails = "dies"
    save_state(training.accelerator, out / "out")


def main() -> None:
    """Run the part."""
    out, stages = Path(sys.argv[1]), [int(stage) for stage in sys.argv[3:]]
    if stages:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(cpu=True, backend="gloo")
    globals()[sys.argv[2]](out, *stages)
    leave()


if __name__ == "__main__":
    main()
