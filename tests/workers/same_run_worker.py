"""A training of one rank that is resumed as another one: ``same_run_worker.py OUT_DIR PART``.

Started by ``test_same_run.py`` without a launcher; each part asserts for itself.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ending import leave
from torch import nn

import ckpt
from ckpt import live
from converters.errors import CheckpointError

Model = Callable[[], nn.Module]


class Net(nn.Module):
    """Three layers of equal shape under the given names."""

    def __init__(self, names: str = "first second third") -> None:
        super().__init__()
        self.names = names.split()
        for name in self.names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = torch.relu(getattr(self, name)(x)) + x
        return x


def config(stage: int = 2, **more: Any) -> dict[str, Any]:
    """A configuration that takes any optimizer of torch."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def begin(
    settings: dict[str, Any] | None = None,
    model: Model = Net,
    optimizer: Any = torch.optim.AdamW,
    schedule: Any = None,
    **options: Any,
) -> Any:
    """An engine; ``optimizer`` ``None``: the configuration's."""
    import deepspeed

    torch.manual_seed(3)
    module = model()
    given: dict[str, Any] = {"model_parameters": list(module.parameters())}
    if optimizer is not None:
        given["optimizer"] = optimizer(module.parameters(), **{"lr": 1e-2, **options})
    if schedule is not None:
        given["lr_scheduler"] = schedule(given["optimizer"])
    engine, *_ = deepspeed.initialize(model=module, config=settings or config(), **given)
    return engine


def train(engine: Any, steps: int = 1) -> list[float]:
    """The learning rate of each of some steps."""
    rates = []
    dtype = next(engine.module.parameters()).dtype
    for _ in range(steps * engine.gradient_accumulation_steps()):
        rates.append(engine.get_lr()[0])
        loss = engine(torch.linspace(-1, 1, 16).reshape(2, 8).to(dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
    return rates


def save(engine: Any, run: Path, steps: int = 3) -> dict[str, torch.Tensor]:
    """The masters after some steps, which are saved."""
    train(engine, steps)
    with ckpt.Saver(engine, run, preflight=False) as saver:
        saver.save(steps)
    return masters(engine)


def masters(engine: Any) -> dict[str, torch.Tensor]:
    found = live.fp32_state_dict(engine, None)
    assert found is not None
    return {name: value.clone() for name, value in found.items()}


@contextmanager
def hearing() -> Iterator[list[str]]:
    """What the library warns of in this block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ckpt")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def refused(engine: Any, run: Path, *texts: str, **options: Any) -> str:
    """The error of a resume, which has not touched the engine and says all ``texts``."""
    before, steps = masters(engine), engine.global_steps
    try:
        ckpt.resume(engine, run, **options)
    except CheckpointError as error:
        for text in texts:
            assert text in str(error), (text, str(error))
        assert engine.global_steps == steps
        assert all(torch.equal(before[name], value) for name, value in masters(engine).items())
        return str(error)
    raise AssertionError(f"not refused: {texts}")


def equal(
    engine: Any, expected: dict[str, torch.Tensor], names: dict[str, str] | None = None
) -> None:
    found = masters(engine)
    for name, value in expected.items():
        for old, new in (names or {}).items():
            name = name.replace(old, new)
        assert torch.equal(found[name], value), name


def half_life(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def options(out: Path) -> None:
    """Options of the optimizer: kept with a sentence, or overridden from the next step on."""
    schedules = {
        "lambda": half_life,
        "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), half_life(o)], [4]
        ),
        "none": None,
    }
    for name, schedule in schedules.items():
        run = out / f"options-{name}"
        save(begin(schedule=schedule), run)
        straight = train(begin(schedule=schedule), 6)
        asked = {"lr": 4e-2, "weight_decay": 0.5, "betas": (0.8, 0.9)}
        with hearing() as lines:
            engine = begin(schedule=schedule, **asked)
            assert ckpt.resume(engine, run) == 3
        said = "\n".join(lines)
        start = f"lr: {straight[3]} of the checkpoint is used"
        assert start in said and '0.04 was asked for; override={"lr"} takes yours' in said, said
        assert "weight_decay: 0.01 of the checkpoint is used, 0.5 was asked for" in said, said
        assert "betas: 0.9, 0.999 of the checkpoint is used, 0.8, 0.9 was asked for" in said, said
        assert train(engine, 3) == straight[3:], (name, straight)
        with hearing() as lines:
            engine = begin(schedule=schedule, **asked)
            assert ckpt.resume(engine, run, override={"lr", "weight_decay"}) == 3
        said = "\n".join(lines)
        assert "lr: 0.04 is used" in said and "weight_decay: 0.5 is used" in said, said
        straight = train(begin(schedule=schedule, **asked), 6)
        rates = train(engine, 3)
        for rate, other in zip(rates, straight[3:], strict=True):
            assert abs(rate - other) < 1e-9, (name, rates, straight)
        group = engine.optimizer.param_groups[0]
        assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.9, 0.999)
    refused(begin(), run, "override: 'learning_rate' is not an option", override=["learning_rate"])


def optimizers(out: Path) -> None:
    """Another optimizer is refused, and a new one begins where that is said."""
    names = ("SGD", "RMSprop", "Adagrad", "NAdam", "Adafactor")
    for stage in (0, 2, 3):
        run = out / f"optimizer-{stage}"
        held = save(begin(config(stage)), run)
        for name in names if stage == 2 else names[:1]:
            engine = begin(config(stage), optimizer=getattr(torch.optim, name))
            line = "optimizer: AdamW saved, "
            for mode in ("error", "warn"):
                refused(engine, run, line, name, "load_optimizer_states=False", on_mismatch=mode)
            assert ckpt.resume(engine, run, load_optimizer_states=False) == 3
            equal(engine, held)
            train(engine)
    engine = begin(config(3), optimizer=torch.optim.Adam)
    refused(engine, run, "AdamW saved, Adam now; they differ in whether weight decay")
    assert ckpt.resume(engine, run, on_mismatch="warn") == 3
    train(engine)


def names(out: Path) -> None:
    """Renamed parameters of equal shape are never taken for others."""
    for stage in (0, 1, 2, 3):
        run = out / f"names-{stage}"
        held = save(begin(config(stage)), run)
        other = lambda: Net("first other third")  # noqa: E731
        both = ("second.weight (8 x 8)", "other.weight (8 x 8)", "renamed={")
        for mode in ("error", "warn"):
            strict = {"on_mismatch": mode, "load_module_strict": False}
            refused(begin(config(stage), other), run, *both, **strict)
        for new in (
            {"second.": "other."},
            {f"second.{k}": f"other.{k}" for k in ("weight", "bias")},
        ):
            engine = begin(config(stage), other)
            assert ckpt.resume(engine, run, renamed=new) == 3
            equal(engine, held, {"second": "other"})
            train(engine)
        swapped = lambda: Net("first third second")  # noqa: E731
        refused(begin(config(stage), swapped), run, "is second.weight", "it is third.weight")
        compiled = lambda: torch.compile(Net(), backend="eager")  # noqa: E731
        engine = begin(config(stage), compiled)
        assert ckpt.resume(engine, run) == 3  # torch.compile was switched on
        equal(engine, held, {name: f"_orig_mod.{name}" for name in Net().names})
    bare = run / "checkpoint-3"
    (bare / "manifest.json").unlink()
    foreign = {"load_foreign": True, "on_mismatch": "warn"}
    refused(begin(config(3), other), bare, *both, **foreign)  # DeepSpeed's own lists say it


def rest(out: Path) -> None:
    """Batch, clipping, scheduler, offload, half steps."""
    run = out / "rest"
    save(begin(config(2, gradient_clipping=1.0), schedule=half_life), run)
    many = config(2, gradient_clipping=0.5, train_micro_batch_size_per_gpu=4)
    text = refused(begin(many), run, "train_batch_size: 2 saved, 4 now", "on_mismatch")
    assert "gradient_clipping: 1.0 saved, 0.5 now" in text and "scheduler: LambdaLR saved, " in text
    once = config(2, gradient_clipping=1.0, train_micro_batch_size_per_gpu=1)
    once |= {"gradient_accumulation_steps": 2, "steps_per_print": 3}
    with hearing() as lines:
        engine = begin(once, schedule=half_life)
        assert ckpt.resume(engine, run) == 3 and engine.micro_steps == 6
    assert any("gradient_accumulation_steps: 1 saved, 2 now" in line for line in lines), lines
    for states in (True, False):
        engine = begin(config(2, gradient_clipping=1.0), schedule=half_life)
        more = {"load_optimizer_states": states, "load_lr_scheduler_states": False}
        assert ckpt.resume(engine, run, **more) == 3
        assert train(engine, 2) == [1e-2, 5e-3]
    half = begin(config(2, gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=1))
    train(half, 2)
    half.backward(half(torch.ones(1, 8)).square().mean())
    half.step()
    with hearing() as lines, ckpt.Saver(half, out / "half", preflight=False) as saver:
        saver.save(2)
    assert any("1 of 2 micro batches into a step" in line for line in lines), lines
    engine = begin(config(2, gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=1))
    with hearing() as lines:
        assert ckpt.resume(engine, out / "half") == 2 and engine.micro_steps == 4
    assert any("goes on from the whole step before" in line for line in lines), lines


def older(out: Path) -> None:
    """A manifest that notes less, as older ones do, resumes; what it notes is compared."""
    run = out / "older"
    held = save(begin(), run)
    path = run / "checkpoint-3" / "manifest.json"
    noted = json.loads(path.read_text())
    del noted["progress"]["settings"], noted["digest"]
    path.write_text(json.dumps(noted))
    engine = begin(schedule=half_life, lr=4e-2)
    assert ckpt.resume(engine, run, load_lr_scheduler_states=False) == 3
    equal(engine, held)
    try:
        ckpt.resume(begin(optimizer=torch.optim.SGD), run)
    except CheckpointError as error:
        assert "have no momentum, which SGD needs" in str(error), error
    else:
        raise AssertionError("it went on")
    sgd = begin(optimizer=torch.optim.SGD)
    assert ckpt.resume(sgd, run, load_optimizer_states=False) == 3
    more = config(2, train_micro_batch_size_per_gpu=4)
    refused(begin(more), run, "train_batch_size: 2 saved, 4 now")
    refused(begin(model=lambda: Net("first other third")), run, "it is other.weight", "renamed={")
    try:
        ckpt.resume(begin(config(2, gradient_clipping=0.5)), run)
    except CheckpointError as error:
        assert "config: gradient_clipping: none saved, 0.5 now" in str(error), error
    else:
        raise AssertionError("it went on")
    there = config(2, zero={"offload_optimizer": {"device": "cpu"}})
    assert ckpt.resume(begin(there), run) == 3


def offload(out: Path) -> None:
    """The optimizer moves to the host and back: other classes, the same training."""
    there = {"offload_optimizer": {"device": "cpu"}}
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    specs = {name: config(2, zero=zero, **adam) for name, zero in (("off", {}), ("on", there))}
    specs["torch"] = config(2)
    for name, spec in specs.items():
        run = out / f"offload-{name}"
        own: dict[str, Any] = {"optimizer": torch.optim.AdamW if name == "torch" else None}
        engine = begin(spec, **own)
        save(engine, run)
        train(engine, 2)
        expected = masters(engine)
        for other, more in specs.items():
            own["optimizer"] = torch.optim.AdamW if other == "torch" else None
            engine = begin(more, **own)
            assert ckpt.resume(engine, run) == 3
            train(engine, 2)
            for key, value in masters(engine).items():
                close = torch.allclose(value, expected[key], rtol=1e-4, atol=1e-6)
                assert close, (name, other, key, (value - expected[key]).abs().max())


def main() -> None:
    import deepspeed

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    deepspeed.init_distributed(dist_backend="gloo")
    for part in sys.argv[2:]:
        globals()[part](Path(sys.argv[1]))
    leave()


if __name__ == "__main__":
    main()
