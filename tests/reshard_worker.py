"""One rank that resumes from resharded checkpoints with stock DeepSpeed, and says what it found.

reshard_worker.py load JOBS            each {"folder", "spec", "stage", "out"}: what the engine
                                       holds after load_checkpoint, as scripts/fixture_worker.py
                                       records it, and out.json: steps, rates, loss scale
reshard_worker.py train OUT STAGE DTYPE STEPS [FROM]
                                       trains the tiny model on the same global batches whatever
                                       the world size; saves; OUT/losses.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from fixture_specs import SPECS, WORDS, Spec, ds_config
from fixture_worker import Tiny, live_state, llama_trainer, param_groups
from safetensors.torch import save_file

GLOBAL_BATCH = 12  # sequences: world sizes 1, 2, 3 and 4 divide it


def engine_for(spec: Spec, seed: int, **config: Any) -> Any:
    """The engine of a tiny model, its weights from ``seed``."""
    import deepspeed

    settings = ds_config(spec) | config
    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=spec.stage == 3):
        model = Tiny(spec)
    groups = param_groups(model, spec.groups)
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def facts(engine: Any, client: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer has beside tensors."""
    inner = engine.optimizer.optimizer
    steps = sorted({float(state["step"]) for state in inner.state.values()})
    kept = ("lr", "weight_decay", "betas", "eps")
    groups = [{k: g[k] for k in kept} for g in inner.param_groups]
    scaler = vars(engine.optimizer.loss_scaler)
    return {
        "steps": steps,
        "groups": groups,
        "scaler": {k: v for k, v in scaler.items() if isinstance(v, (int, float))},
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "epoch": client.get("epoch"),
    }


def load(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        world = torch.distributed.get_world_size()
        spec = dataclasses.replace(SPECS[job["spec"]], stage=job["stage"], world=world)
        engine = engine_for(spec, seed=4321)
        path, client = engine.load_checkpoint(job["folder"])
        assert path is not None, job
        live = live_state(engine, spec)
        if torch.distributed.get_rank() == 0:
            save_file(live, job["out"])
            Path(job["out"]).with_suffix(".json").write_text(json.dumps(facts(engine, client)))
        torch.distributed.barrier()
        engine.destroy()


def train(out: Path, stage: int, dtype: str, steps: int, source: str | None) -> None:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    spec = Spec(stage, dtype, world, zero={"sub_group_size": 200} if stage == 3 else {})
    micro = GLOBAL_BATCH // world
    engine = engine_for(spec, seed=1234, train_micro_batch_size_per_gpu=micro)
    done = 0
    if source is not None:
        path, _ = engine.load_checkpoint(source)
        assert path is not None
        done = engine.global_steps
        loaded = live_state(engine, spec)
        if rank == 0:
            out.mkdir(parents=True)
            save_file(loaded, out / "loaded.safetensors")
    losses = []
    for step in range(done, done + steps):
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
        (out / "losses.json").write_text(json.dumps(losses))
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
        case ["train", out, stage, dtype, steps, *source]:
            train(Path(out), int(stage), dtype, int(steps), source[0] if source else None)
        case ["trainer", out, name, source]:
            trainer(Path(out), name, source)
        case other:
            raise SystemExit(f"unknown: {other}")


if __name__ == "__main__":
    main()
