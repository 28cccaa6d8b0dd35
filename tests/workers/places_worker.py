"""One rank of a training: ``places_worker.py OUT_DIR PART``, one function each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from faults import places

import ckpt
from ckpt.runs.manifest import check
from ckpt.runs.run import Run
from converters.errors import CheckpointError

WIDTH = 96
BF16, FP16, FP32 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, {}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Model(nn.Module):
    """A few layers, the first of them frozen if that is asked for."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
        if frozen:
            for layer in self.layers[:3]:
                layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x).float().square().mean()
        return found


@dataclass(frozen=True)
class Case:
    """``optimizer`` makes one from parameters, AdamW by default."""

    stage: int
    precision: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], Any] | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    saver: dict[str, Any] = field(default_factory=dict)


def adafactor(parameters: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-3, relative_step=False)


class Lion(torch.optim.Optimizer):
    """One as users write them: the class's name is all that tells what it keeps."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("exp_avg", torch.zeros_like(p)).add_(p.grad)
                    p.sub_(self.state[p]["exp_avg"].sign(), alpha=1e-3)


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


CASES = {
    "zero0 fp32": Case(0, FP32),
    "zero0 bf16": Case(0, BF16),
    "zero0 fp16": Case(0, FP16),
    "zero0 adafactor": Case(0, FP32, adafactor),
    "zero1 bf16": Case(1, BF16),
    "zero1 fp32": Case(1, FP32),
    "zero2 bf16": Case(2, BF16),
    "zero2 fp16": Case(2, FP16),
    "zero2 offload": Case(2, BF16, None, OFFLOAD),
    "zero2 sgd": Case(2, BF16, sgd),
    "zero2 plain sgd": Case(2, BF16, lambda p: torch.optim.SGD(p, lr=0.01)),
    "zero2 adagrad": Case(2, BF16, torch.optim.Adagrad),
    "zero2 lion": Case(2, BF16, Lion),
    "zero2 adafactor": Case(2, BF16, adafactor),
    "zero2 amsgrad": Case(2, BF16, lambda p: torch.optim.Adam(p, amsgrad=True)),
    "zero2 frozen": Case(2, BF16, None, {}, True),
    "zero2 without frozen": Case(2, BF16, None, {}, True, {"exclude_frozen_parameters": True}),
    "zero2 weights": Case(2, BF16, None, {}, False, {"weights": "bf16"}),
    "zero3 bf16": Case(3, BF16),
    "zero3 fp32": Case(3, FP32),
    "zero3 fp16": Case(3, FP16),
    "zero3 sub-groups": Case(3, BF16, None, {"sub_group_size": 20_000}),
    "zero3 offload": Case(3, BF16, None, OFFLOAD),
    "zero3 frozen": Case(3, BF16, None, {}, True),
    "zero3 weights fp32": Case(3, BF16, None, {}, False, {"weights": "fp32"}),
}


def start(case: Case) -> Any:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, **case.zero},
        **case.precision,
    }
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=case.stage == 3):
        model = Model(case.frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (case.optimizer or torch.optim.AdamW)(trained)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(2, WIDTH, dtype=next(engine.module.parameters()).dtype)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def predictions(out: Path) -> None:
    """What is predicted before the first step, after it, and what a checkpoint then takes."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(1)
        engine = start(case)
        with ckpt.Saver(engine, out / name, **case.saver) as saver:
            before = saver.predicted
            train(engine, 2)
            after = ckpt.Saver(engine, out / name, **case.saver).predicted
            saver.save(2)
        newest = Run(out / name).newest()
        assert newest is not None
        found[name] = [before, after, newest.nbytes]
        engine.destroy()
    if not dist.get_rank():
        (out / "predictions.json").write_text(json.dumps(found))


LACKS = {
    "nothing": ((), ""),
    "folder fsync": (("foldersync",), ""),
    "fsync": (("filesync",), "ENOTSUP"),
    "folder rename": (("folderrename", "exchange"), ""),
    "folder rename EPERM": (("folderrename",), "EPERM"),
    "map, lock, allocate, mode": (("map", "lock", "allocate", "mode"), ""),
    "exchange": (("exchange",), ""),
    "late sizes": (("size",), ""),
}


def lack(out: Path, name: str) -> None:
    what, error = LACKS[name]
    os.environ.pop("PLACE_ERRNO", None)
    if "size" in what:  # of what rank 1 writes, on rank 0
        os.environ.update(places.lacking(out, *what, late=500, match="rank_1"))
        os.environ["PLACE_RANK"] = "0"
    else:
        os.environ.update(places.lacking(out, *what, error=error))


def saver(out: Path) -> None:
    """Saves, the same step twice, pruning and a resume, wherever something is lacking."""
    engine, resumed = (start(CASES["zero2 bf16"]) for _ in range(2))
    for name in LACKS:
        run = out / name
        lack(out, name)
        with ckpt.Saver(engine, run, retention=ckpt.Retention(last=1), weights="bf16") as saver:
            for step in (1, 2, 2):
                train(engine, 1)
                saver.save(step)
        step = ckpt.resume(resumed, run)
        assert step == 2, (name, step)
        train(resumed, 1)
        dist.barrier()
        left = sorted(path.name for path in run.iterdir())
        assert left == ["checkpoint-2", "latest"], (name, left)
        (newest,) = Run(run).checkpoints()
        assert newest.manifest is not None
        assert check(newest.folder, newest.manifest, data=True) == [], name
        listed = {p.relative_to(newest.folder).as_posix() for p in newest.folder.rglob("*.*")}
        assert listed <= {*newest.manifest.files, "manifest.json"}, (name, listed)
        dist.barrier()
    for made in (engine, resumed):
        made.destroy()


def refused(out: Path) -> None:
    """What a save cannot do without is refused at the start, and nothing is left."""
    case, told = CASES["zero2 bf16"], {}
    run = out / "run"
    if not dist.get_rank():
        (run / ".preflight-dead").mkdir(parents=True)
        (run / ".preflight-dead/.lock").write_bytes(b"")
        (run / ".nonce-dead").write_bytes(b"")
    engine = start(case)
    for what, error in (("filerename", "EXDEV"), ("size", ""), ("folderrename,filerename", "EIO")):
        os.environ.pop("PLACE_ERRNO", None)
        for variable in ("PLACE_LATE", "PLACE_RANK"):
            os.environ.pop(variable, None)
        os.environ.update(places.lacking(out, what, error=error))
        try:
            ckpt.Saver(engine, out / "run")
            told[what] = "nothing"
        except CheckpointError as refusal:
            told[what] = str(refusal)
        dist.barrier()
        os.environ["PLACE_LACKS"] = ""
        told[what + " left"] = [path.name for path in (out / "run").iterdir()]
        dist.barrier()
    engine.destroy()
    (out / f"refused{dist.get_rank()}.json").write_text(json.dumps(told))


def main() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    places.wake_here()
    deepspeed.init_distributed(dist_backend="gloo")
    get_accelerator().is_fp16_supported = lambda: True
    out = Path(sys.argv[1])
    for part in sys.argv[2].split(","):
        globals()[part](out)
    dist.barrier()
    leave()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
