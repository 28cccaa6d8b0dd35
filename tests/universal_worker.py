"""One rank that resumes from universal folders with stock DeepSpeed, and says what it found.

universal_worker.py load JOBS          each {"folder", "spec", "stage", "zero", "out"}: what the
                                       engine holds after load_checkpoint with load_universal, as
                                       reshard_worker.py has it
universal_worker.py train JOBS         each {"out", "spec", "stage", "zero", "torch_adam", "steps"}
                                       and perhaps "source" and "universal": trains as
                                       reshard_worker.py does, and saves; OUT/losses.json
universal_worker.py trainer OUT NAME FROM
                                       the Trainer resumes with load_universal
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from fixture_specs import SPECS, WORDS
from fixture_worker import live_state, llama_trainer
from reshard_worker import GLOBAL_BATCH, engine_for, facts
from safetensors.torch import save_file

UNIVERSAL = {"checkpoint": {"load_universal": True}}


def spec_of(job: dict[str, Any]) -> Any:
    return dataclasses.replace(
        SPECS[job["spec"]],
        stage=job["stage"],
        world=torch.distributed.get_world_size(),
        zero=job.get("zero", {}),
        torch_adam=job.get("torch_adam", True),
    )


def load(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        spec = spec_of(job)
        engine = engine_for(spec, seed=4321, **UNIVERSAL)
        path, client = engine.load_checkpoint(job["folder"])
        assert path is not None, job
        live = live_state(engine, spec)
        if torch.distributed.get_rank() == 0:
            save_file(live, job["out"])
            Path(job["out"]).with_suffix(".json").write_text(json.dumps(facts(engine, client)))
        torch.distributed.barrier()
        engine.destroy()


def train(job: dict[str, Any]) -> None:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    spec, out = spec_of(job), Path(job["out"])
    micro = GLOBAL_BATCH // world
    config = UNIVERSAL if job.get("universal") else {}
    engine = engine_for(spec, seed=1234, train_micro_batch_size_per_gpu=micro, **config)
    done = 0
    if "source" in job:
        path, _ = engine.load_checkpoint(job["source"])
        assert path is not None
        done = engine.global_steps
    losses = []
    for step in range(done, done + job["steps"]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(WORDS, (GLOBAL_BATCH, 6), generator=generator)
        loss = engine(batch[rank * micro : (rank + 1) * micro])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    engine.save_checkpoint(str(out))
    live = live_state(engine, spec)
    if rank == 0:
        save_file(live, out / "live.safetensors")
        said = facts(engine, {})
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "facts.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    engine.destroy()


def trainer(out: Path, name: str, source: str) -> None:
    import transformers as hf

    world = torch.distributed.get_world_size()
    spec = dataclasses.replace(SPECS[name], world=world)

    class Seen(hf.TrainerCallback):  # type: ignore[misc]
        """What the engine holds when training goes on."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            live = live_state(made.model_wrapped, spec)
            if torch.distributed.get_rank() == 0:
                save_file(live, out / "loaded.safetensors")

    made = llama_trainer(name, out)
    made.args.hf_deepspeed_config.config |= UNIVERSAL
    made.args.max_steps = 4
    made.add_callback(Seen())
    made.train(resume_from_checkpoint=source)
    if torch.distributed.get_rank() == 0:
        steps = facts(made.model_wrapped, {})["steps"]
        said = {"global_step": made.state.global_step, "steps": steps}
        (out / "state.json").write_text(json.dumps(said))


def main() -> None:
    import deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    match sys.argv[1:]:
        case ["load", jobs]:
            load(json.loads(Path(jobs).read_text()))
        case ["train", jobs]:
            for job in json.loads(Path(jobs).read_text()):
                train(job)
        case ["trainer", out, name, source]:
            trainer(Path(out), name, source)
        case other:
            raise SystemExit(f"unknown: {other}")


if __name__ == "__main__":
    main()
