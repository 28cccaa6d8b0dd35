"""One rank of trainings that go on in another topology or precision: ``OUT_DIR PART [MORE ...]``.

Started by ``test_topology.py`` through torchrun, one function a part.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate.state import PartialState
from ending import leave
from fixture_specs import OFFLOAD, Spec
from fixture_worker import live_state
from hf_worker import config, make
from live_worker import SMALL, caught
from resume_worker import WARM, Sampler, begin, finals, train
from trainers_worker_accelerate import Training

import ckpt
from ckpt import live
from ckpt.rewrite import reshard
from ckpt.trainers.accelerate import load_state, save_state
from ckpt.trainers.hf import CommittedCheckpoints, ResumeCallback

KINDS = ("bf16", "fp16", "fp32")
SUMS = {**WARM, "data_types": {"grad_accum_dtype": "fp32"}}
PRECISIONS = {
    "zero0": Spec(0, config=WARM),
    "zero1": Spec(1, config=WARM),
    "zero2": Spec(2, zero=OFFLOAD, config=WARM),
    "zero3": Spec(3, zero={"sub_group_size": 20, **SMALL}, config=WARM, zero_sized=True),
}
STATE = ("fp32/", "exp_avg/", "exp_avg_sq/")


def spec_of(name: str, kind: str) -> Spec:
    """A case in one precision; in bf16, stage 1 is that of BF16_Optimizer."""
    spec = replace(PRECISIONS[name], dtype=kind)
    return replace(spec, config=SUMS) if (name, kind) == ("zero1", "bf16") else spec


def precisions(out: Path, only: str = "") -> None:
    """Each stage saved in each precision, and resumed in the two others."""
    for name in only.split(",") if only else PRECISIONS:
        saved: dict[str, Any] = {}
        for kind in KINDS:
            spec = spec_of(name, kind)
            engine = begin(spec)
            train(engine, 2, Sampler())
            with ckpt.Saver(engine, out / f"{name}-{kind}") as saver:
                saver.save(2)
            saved[kind] = state_of(engine, spec)
            engine.destroy()
        for now in KINDS:
            spec = spec_of(name, now)
            engine = begin(spec)
            for kind in KINDS:  # the second one in an engine that has trained on
                if now != kind:
                    resumed(engine, out / f"{name}-{kind}", spec, saved[kind])
            engine.destroy()
        if name == "zero3":
            other_sub_groups(out)


def other_sub_groups(out: Path) -> None:
    """Stage 3 with other sub-groups: refused by name, and the command makes what loads."""
    run = out / "zero3-bf16"
    spec = replace(spec_of("zero3", "bf16"), zero={"sub_group_size": 1000, **SMALL})
    engine = begin(spec)
    if not dist.get_rank():
        said = caught(lambda: ckpt.resume(engine, run, timeout=20))[0]
        (out / "cut.json").write_text(json.dumps(said))
        reshard.execute(reshard.plan(run / "checkpoint-2", 2, sub_group_size=1000))
    else:
        caught(lambda: ckpt.resume(engine, run, timeout=20))
    dist.barrier()
    assert ckpt.resume(engine, run / "checkpoint-2-w2") == 2
    train(engine, 1, Sampler())
    engine.destroy()


def resumed(engine: Any, run: Path, spec: Spec, saved: dict[str, Any]) -> None:
    """Masters and moments are those that were saved, weights the masters rounded; it goes on."""
    scale = scale_of(engine)
    assert ckpt.resume(engine, run) == 2 == engine.global_steps
    assert str(run) not in Path("/proc/self/maps").read_text(), "it is still mapped"
    live = state_of(engine, spec)  # which looks whether masters round to weights
    assert live.keys() & saved.keys() >= {f"fp32/{n}" for n, _ in trained(engine)}
    for key in live.keys() & saved.keys():
        value = saved[key]
        if key.startswith(STATE):
            assert live[key].dtype == torch.float32 and torch.equal(live[key], value), (run, key)
        elif key.startswith("live/frozen"):
            assert torch.equal(live[key], value.to(live[key].dtype)), (run, key)
    assert scale_of(engine) == scale, (scale, scale_of(engine))
    assert all(math.isfinite(loss) for loss in train(engine, 2, Sampler()))
    assert engine.global_steps == 4 and engine.skipped_steps == 0
    state_of(engine, spec)
    alone = ({"load_optimizer_states": False}, {"load_module_only": True})
    for options in alone if "bf16" in run.name else ():
        assert ckpt.resume(engine, run, **options) == (0 if "load_module_only" in options else 2)
        for name, value in finals(engine).items():
            assert torch.equal(value, saved.get(f"fp32/{name}", value)), (run, options, name)
        train(engine, 1, Sampler())


class Auto(CommittedCheckpoints, hf.Trainer):
    """The class form, which reshards."""

    reshard = "auto"


class Plain(CommittedCheckpoints, hf.Trainer):
    """The class form as it is."""


class Begins(hf.TrainerCallback):
    """The fp32 weights that a training begins with."""

    def on_train_begin(self, *_: Any, **seen: Any) -> None:
        self.weights = live.fp32_state_dict(self.trainer.model_wrapped, None)

    trainer: Any = None


STEPS = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no", "eval_steps": None}
SAVES = {"save_strategy": "steps", "save_steps": 1}
FP32 = {key: value for key, value in config(2).items() if key != "bf16"}


def saves(out: Path) -> None:
    """A run of the Trainer and one of Accelerate, on two ranks; one is resharded for one rank."""
    options = {**STEPS, **SAVES, "max_steps": 2, "save_steps": 2}
    trainer, _ = make(Plain, out / "hf", 2, **options)
    trainer.train()
    accelerated = Training(out / "acc", 2)
    accelerated.steps(2)
    save_state(accelerated.accelerator, out / "acc")
    save_state(accelerated.accelerator, out / "both")
    accelerated.end()
    del trainer, accelerated
    save_loop(out / "loop")
    first = out / "hf" / "checkpoint-2"
    if not dist.get_rank():
        reshard.execute(reshard.plan(first, 1))
        shutil.copytree(first, out / "alone" / "checkpoint-2")
        for folder in (out / "alone" / "checkpoint-2").glob("global_step*"):
            shutil.rmtree(folder)
        (out / "alone" / "checkpoint-2" / "manifest.json").unlink()
    dist.barrier()
    assert ckpt.find(out / "hf") == str(first)  # of two of one step


def goes_on(out: Path) -> None:
    """On one rank, and in stage 3: what is said, and what is done where that was asked for."""
    said, run = {}, out / "hf"
    source = {name: value.clone() for name, value in ckpt.open(run / "checkpoint-2").items()}

    def begin(kind: Any, stage: int, where: Path, checkpoint: Any, **more: Any) -> Any:
        begins = Begins()
        callbacks = [begins, *more.pop("callbacks", [])]
        options = {**STEPS, "callbacks": callbacks, **more}
        begins.trainer, _ = make(kind, where, stage, **options)
        found = checkpoint() if callable(checkpoint) else checkpoint
        begins.trainer.train(resume_from_checkpoint=found and str(found))
        return begins

    def refused(name: str, *args: Any, **more: Any) -> None:
        said[name] = caught(lambda: begin(*args, **more))[0]

    def works(*args: Any, **more: Any) -> None:
        begins = begin(*args, **more)
        assert begins.trainer.state.global_step == 3
        for name, value in begins.weights.items():
            assert torch.equal(value, source[name]), (args, name)
        del begins
        gc.collect()

    first = run / "checkpoint-2"
    refused("class", Plain, 3, out / "new", first)
    refused("weights", Plain, 2, out / "alone", out / "alone" / "checkpoint-2")
    refused("callback", hf.Trainer, 3, out / "new", first, callbacks=[ResumeCallback(first)])
    gc.collect()
    stock = import_module("transformers.trainer").deepspeed_load_checkpoint
    assert stock.__module__ == "transformers.integrations.deepspeed"  # nobody watches any more
    resumes = {"callbacks": [ResumeCallback(first)]}
    works(Auto, 3, out / "new", first, **resumes, **SAVES)
    assert ckpt.find(out / "new") == str(out / "new" / "checkpoint-3")
    works(Auto, 2, out / "new", lambda: ckpt.find(run), **resumes)
    best = begin(Auto, 2, out / "best", None, max_steps=1).trainer  # of before: other ranks
    best.state.best_model_checkpoint = str(first)
    best._load_best_model()
    for name, value in (live.fp32_state_dict(best.model_wrapped, None) or {}).items():
        assert torch.equal(value, source[name]), name
    again = lambda: ckpt.find(run, reshard="auto")  # noqa: E731
    works(hf.Trainer, 1, out / "new", again, callbacks=[ResumeCallback(run)])
    fits = run / "checkpoint-2-w1"
    for kind in (Plain, hf.Trainer):  # in another precision, too
        callbacks = [ResumeCallback(fits)]
        works(kind, 2, out / "new", fits, deepspeed=FP32, bf16=False, callbacks=callbacks)
    said["names"] = sorted(path.name for path in run.glob("checkpoint-2*"))

    training = Training(out / "again", 2)
    load = partial(load_state, training.accelerator, out / "acc", on_mismatch="warn")
    said["accelerate"] = caught(load)[0]
    assert load(reshard="auto") == 2 == training.counter.count
    training.steps(1)
    training.end()
    training = Training(out / "again", 2, bf16=False)  # in fp32
    step = load_state(training.accelerator, out / "acc", on_mismatch="warn")
    assert step == 2 == training.counter.count  # of one step, the one that fits
    source = {name: value.clone() for name, value in ckpt.open(out / "acc/checkpoint-2").items()}
    for name, value in (live.fp32_state_dict(training.engine, None) or {}).items():
        assert torch.equal(value, source[name]), name
    training.steps(1)
    training.end()
    said |= disagree(out / "loop")
    (out / "said.json").write_text(json.dumps(said))


LOOP = Spec(2, config=WARM)
DISAGREEMENTS = {
    "parameters": replace(LOOP, tied=False),
    "groups": replace(LOOP, groups="one"),
    "scheduler": replace(LOOP, config={}),
    "clipping": replace(LOOP, config={**WARM, "gradient_clipping": 0.5}),
    "stage": replace(LOOP, stage=3),
}


def save_loop(run: Path) -> None:
    """A run of a loop of DeepSpeed's engine, whose checkpoint is resharded for one rank."""
    engine = begin(LOOP)
    train(engine, 2, Sampler())
    with ckpt.Saver(engine, run) as saver:
        saver.save(2)
    engine.destroy()
    if not dist.get_rank():
        reshard.execute(reshard.plan(run / "checkpoint-2", 1))
    dist.barrier()


def disagree(run: Path) -> dict[str, str]:
    """One rank resumes from what was resharded for it, or says why this training is another one.

    A refusal comes before anything is loaded, and leaves the engine as it was.
    """
    original, said = run / "checkpoint-2", {}
    source = {name: value.clone() for name, value in ckpt.open(original).items()}

    for name, spec in DISAGREEMENTS.items():
        engine = begin(spec)
        before = finals(engine)
        said[name] = caught(lambda: ckpt.resume(engine, run))[0]  # noqa: B023
        for parameter, value in finals(engine).items():
            assert torch.equal(value, before[parameter]), (name, parameter)
        engine.destroy()

    engine = begin(LOOP)  # of half the samples a step, which is only said
    assert ckpt.resume(engine, run) == 2 == engine.global_steps
    for name, value in finals(engine).items():
        assert torch.equal(value, source[name]), name
    train(engine, 1, Sampler())
    engine.destroy()

    part = next((run / "checkpoint-2-w1").rglob("*optim_states.pt"))
    os.truncate(part, part.stat().st_size // 2)
    engine = begin(LOOP)
    said["damaged"] = caught(lambda: ckpt.resume(engine, run))[0]
    said["by name"] = caught(lambda: ckpt.resume(engine, run / "checkpoint-2-w1"))[0]
    engine.destroy()
    return said


def grows(out: Path) -> None:
    """On two ranks from a checkpoint of one, by each way."""
    fits = out / "hf" / "checkpoint-2-w1"
    source = {name: value.clone() for name, value in ckpt.open(fits).items()}
    for stage in (3, 2):
        begins = Begins()
        callbacks = [begins, ResumeCallback(fits)]
        begins.trainer, _ = make(Auto, out / "grown", stage, **STEPS, callbacks=callbacks)
        begins.trainer.train(resume_from_checkpoint=str(fits))
        assert begins.trainer.state.global_step == 3
        for name, value in (begins.weights or {}).items():
            assert torch.equal(value, source[name]), name


def trained(engine: Any) -> list[Any]:
    """The parameters that are trained, and their names."""
    return [pair for pair in engine.module.named_parameters() if pair[1].requires_grad]


def state_of(engine: Any, spec: Spec) -> dict[str, torch.Tensor]:
    """``live_state``, or of a BF16_Optimizer, which that does not read, the masters and moments."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups") or spec.stage in (0, 3):
        return live_state(engine, spec)
    names = {id(parameter): name for name, parameter in trained(engine)}
    found = {}
    for mine, group in zip(
        optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True
    ):
        state = optimizer.optimizer.state[mine]
        for kind, part in zip(STATE, (mine, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, part.detach().contiguous())
            whole, at = torch.cat(parts), 0
            for parameter in group:
                value = whole[at : at + parameter.numel()].view_as(parameter).clone()
                found[kind + names[id(parameter)]] = value
                at += parameter.numel()
                if kind == "fp32/":
                    assert torch.equal(value.to(parameter.dtype), parameter)
    return found


def scale_of(engine: Any) -> Any:
    """The loss scale, if there is one."""
    optimizer = engine.optimizer
    return getattr(getattr(optimizer, "loss_scale_config", optimizer), "cur_scale", None)


def main() -> None:
    import deepspeed

    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    out, part, *more = sys.argv[1:]
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=True, backend="gloo")
    globals()[part](Path(out), *more)
    leave()


if __name__ == "__main__":
    main()
