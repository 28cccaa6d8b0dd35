"""One rank that resumes from resharded or universal checkpoints with stock DeepSpeed, and says what
it found.

reshard_worker.py load JOBS            each {"folder", "spec", "stage", "out"}: what the engine
                                       holds after load_checkpoint, as
                                       scripts/fixtures/fixture_worker.py records it, and
                                       out.json: steps, rates, loss scale
reshard_worker.py train JOBS           each {"out", "spec", "stage", "steps"} and perhaps "source":
                                       trains the tiny model on the same global batches whatever
                                       the world size; saves; OUT/losses.json, OUT/facts.json;
                                       with "reshard", that of ``ckpt.resume``, this loads it
reshard_worker.py trainer OUT NAME FROM [universal]
                                       the Trainer resumes
A job may have what takes the place of the spec's ("zero", "config", "dtype", "torch_adam"), and
"universal": whether the engine has load_universal. "init": whether stage 3 has zero.Init. "bare":
what the engine holds is not recorded, since it has no Adam or another optimizer of DeepSpeed's
around it; "again" is where it is saved as soon as it is loaded. "half" is where it is saved, and
what is written of it, after "half_steps". "without_kernel": whether ``DeepSpeedCPUAdam`` is to do
without its compiled kernel, which only a step needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ending import leave
from fixture_specs import SPECS, WORDS, Spec, ds_config
from fixture_worker import Tiny, live_state, llama_trainer, param_groups
from safetensors.torch import save_file

GLOBAL_BATCH = 12  # sequences: world sizes 1, 2, 3 and 4 divide it
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def spec_of(job: dict[str, Any]) -> Spec:
    """The spec of a job's engine, for as many ranks as there are."""
    changed = {key: job[key] for key in ("zero", "config", "dtype", "torch_adam") if key in job}
    world = torch.distributed.get_world_size()
    return dataclasses.replace(SPECS[job["spec"]], stage=job["stage"], world=world, **changed)


def engine_for(spec: Spec, seed: int, job: dict[str, Any], **config: Any) -> Any:
    """The engine of a tiny model, its weights from ``seed``."""
    import deepspeed

    settings = ds_config(spec) | config | (UNIVERSAL if job.get("universal") else {})
    torch.manual_seed(seed)
    with deepspeed.zero.Init(
        config_dict_or_path=settings, enabled=spec.stage == 3 and job.get("init", True)
    ):
        model = Tiny(spec)
    groups = param_groups(model, spec.groups)
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def facts(engine: Any, client: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer has beside tensors."""
    inner = engine.optimizer.optimizer
    steps = sorted({float(state["step"]) for state in inner.state.values() if "step" in state})
    kept = ("lr", "weight_decay", "betas", "eps", "momentum")
    groups = [{k: g[k] for k in kept if k in g} for g in inner.param_groups]
    scaler = vars(getattr(engine.optimizer, "loss_scaler", type("None", (), {})()))
    return {
        "steps": steps,
        "groups": groups,
        "scaler": {k: v for k, v in scaler.items() if isinstance(v, (int, float))},
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "epoch": client.get("epoch"),
    }


def record(engine: Any, spec: Spec, job: dict[str, Any], path: Path) -> None:
    """What the engine holds, as a file. Every rank calls it."""
    if not job.get("bare"):
        live = live_state(engine, spec)
        if torch.distributed.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(live, path)


class NoKernel:
    """The kernel of ``DeepSpeedCPUAdam`` for an engine that takes no step."""

    @staticmethod
    def load() -> NoKernel:
        """In place of the ``load`` of a builder."""
        return NoKernel()

    def create_adam(self, *settings: object) -> None: ...

    def destroy_adam(self, number: int) -> None: ...


def load(job: dict[str, Any]) -> None:
    from deepspeed.ops.adam import cpu_adam

    spec, builder = spec_of(job), cpu_adam.CPUAdamBuilder
    load_kernel = staticmethod(NoKernel.load) if job.get("without_kernel") else builder.load
    with patch.object(builder, "load", load_kernel):
        engine = engine_for(spec, 4321, job)

    if job.get("without_kernel"):
        assert isinstance(engine.optimizer.optimizer, cpu_adam.DeepSpeedCPUAdam)
    path, client = engine.load_checkpoint(job["folder"])
    assert path is not None, job
    record(engine, spec, job, Path(job["out"]))
    if torch.distributed.get_rank() == 0:
        Path(job["out"]).with_suffix(".json").write_text(json.dumps(facts(engine, client)))
    torch.distributed.barrier()
    engine.destroy()


def train(job: dict[str, Any]) -> None:
    spec, out = spec_of(job), Path(job["out"])
    micro = GLOBAL_BATCH // torch.distributed.get_world_size()
    engine = engine_for(spec, 1234, job, train_micro_batch_size_per_gpu=micro)
    done = 0
    if "source" in job:
        resume(engine, job)
        done = engine.global_steps
        if "again" in job:
            engine.save_checkpoint(job["again"])
        record(engine, spec, job, out / "loaded.safetensors")
    losses = []
    for count in range(1, job["steps"] + 1):
        losses.append(step(engine, done + count - 1))
        if count == job.get("half_steps"):
            finish(engine, spec, job, Path(job["half"]), losses)
    finish(engine, spec, job, out, losses)
    engine.destroy()


def resume(engine: Any, job: dict[str, Any]) -> None:
    """Loads the job's source with DeepSpeed, or with what ckpt makes of it for the engine."""
    if job.get("reshard"):
        import ckpt

        assert ckpt.resume(engine, job["source"], reshard=job["reshard"]) == engine.global_steps
    else:
        path, _ = engine.load_checkpoint(job["source"])
        assert path is not None


def step(engine: Any, number: int) -> float:
    """Takes a step on the batch of that number; its loss over all ranks."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    micro = GLOBAL_BATCH // world
    generator = torch.Generator().manual_seed(number)
    batch = torch.randint(WORDS, (GLOBAL_BATCH, 6), generator=generator)
    loss = engine(batch[rank * micro : (rank + 1) * micro])
    engine.backward(loss)
    engine.step()
    mean = loss.detach().double().clone()
    torch.distributed.all_reduce(mean)
    return float(mean) / world


def finish(engine: Any, spec: Spec, job: dict[str, Any], out: Path, losses: list[float]) -> None:
    """Saves, and writes beside it what the engine holds and the losses until now."""
    engine.save_checkpoint(str(out))
    record(engine, spec, job, out / "live.safetensors")
    if torch.distributed.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "facts.json").write_text(json.dumps(facts(engine, {})))
    torch.distributed.barrier()


def trainer(out: Path, name: str, source: str, universal: bool) -> None:
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
    if universal:
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
        case ["load" | "train" as what, jobs]:
            for job in json.loads(Path(jobs).read_text()):
                {"load": load, "train": train}[what](job)
        case ["trainer", out, name, source, *universal]:
            trainer(Path(out), name, source, bool(universal))
        case other:
            raise SystemExit(f"unknown: {other}")
    leave()


if __name__ == "__main__":
    main()
