"""A case trained by real DeepSpeed, saved, and what the live engine held then.

Runs in every rank; ``deepspeed.init_distributed`` has been called.

    FOLDER/save/       what save_checkpoint and save_16bit_model wrote
    FOLDER/live.pt     {"masters", "weights", "buffers", "names"}, see ``held``
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from hardening.differential.cases import BUILT, Buffer, Case, Parameter


class Sum(nn.Module):
    """Adds something of every parameter of its own to what it is called with.

    ``made`` maps the index of a parameter in the case to it: those of this module are added, and
    those that are other names of one are left to the model.
    """

    def __init__(self, case: Case, path: str, made: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.seen: list[str] = []  # the names of those that the loss depends on
        for index, spec in enumerate(case.parameters):
            if spec.module == path and spec.owner < 0:
                made[index] = _parameter(spec)
                self.register_parameter(spec.name, made[index])
                self.see(spec)
        for buffer in case.buffers:
            if buffer.module == path:
                self.register_buffer(buffer.name, _values(buffer), persistent=buffer.persistent)

    def see(self, spec: Parameter) -> None:
        """The loss depends on it, if that is possible."""
        if spec.used and spec.module != "idle" and 0 not in spec.shape:
            self.seen.append(spec.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, name in enumerate(self.seen):
            value = getattr(self, name).float().reshape(-1)
            slope = torch.linspace(0.5, 1.5, len(value))
            x = x + ((value - 0.3 * (place + 1)) * slope * x.mean().cos()).pow(2).mean()
        return x


class Model(Sum):
    """The modules of a case; all are called but ``idle``."""

    def __init__(self, case: Case) -> None:
        made: dict[int, nn.Parameter] = {}
        super().__init__(case, "", made)
        self.layers = nn.ModuleDict(
            {name: Sum(case, f"layers.{name}", made) for name in ("0", "1", "2")}
        )
        for name in ("head", "module", "idle"):
            self.add_module(name, Sum(case, name, made))
        for spec in case.parameters:
            if spec.owner >= 0:
                home = self.get_submodule(spec.module)
                home.register_parameter(spec.name, made[spec.owner])
                home.see(spec)
        if case.twin:
            self.layers["9"] = self.layers["0"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        called = [self.get_submodule(name) for name in ("head", "module")]
        for module in (*self.layers.values(), *called):
            x = module(x)
        return x.mean()


def _parameter(spec: Parameter) -> nn.Parameter:
    value = torch.randn(spec.shape) * 0.5
    if spec.ones:
        value = torch.ones(spec.shape)
    if spec.crossed:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    return nn.Parameter(value, requires_grad=spec.trained)


def _values(spec: Buffer) -> torch.Tensor:
    kind = getattr(torch, spec.kind)
    if kind.is_floating_point:
        return torch.randn(spec.shape).to(kind)
    return torch.randint(0, 2 if spec.kind == "bool" else 200, spec.shape).to(kind)


def train(case: Case, folder: Path) -> None:
    """Trains, saves and notes; every rank must call it."""
    torch.manual_seed(case.index)
    with deepspeed.zero.Init(config_dict_or_path=case.ds_config, enabled=case.init):
        model = Model(case)
    optimizer = _optimizer(case, _groups(case, model))
    with _no_broadcast():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.ds_config)
    torch.manual_seed(100 + dist.get_rank())
    for _ in range(case.steps * case.accumulation):
        engine.backward(engine(torch.rand(1)))
        engine.step()
    save = folder / "save"
    engine.save_checkpoint(str(save), exclude_frozen_parameters=case.exclude_frozen)
    if case.gathered:
        engine.save_16bit_model(str(save), exclude_frozen_parameters=case.exclude_frozen)
    live = held(case, engine)
    if not dist.get_rank():
        torch.save(live, folder / "live.part")
        (folder / "live.part").rename(folder / "live.pt")
    dist.barrier()
    engine.destroy()


@contextmanager
def _no_broadcast() -> Iterator[None]:
    """Without the first broadcast of the weights, which are alike: all ranks have the same seed.

    DeepSpeed 0.19.8 sends them as bytes, which fails for scalars and transposed tensors; earlier
    versions trained with both.
    """
    kept = deepspeed.DeepSpeedEngine._broadcast_model
    deepspeed.DeepSpeedEngine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._broadcast_model = kept


def _groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """The param groups as a user's code makes them."""
    found: list[dict[str, Any]] = [{"params": [], **settings} for settings in case.groups]
    specs = {spec.path: spec for spec in case.parameters}
    # Stages 1 and 2 fail with a group in which nothing is trained, so none is made.
    whole = {s.group for s in case.parameters if s.trained and s.group >= 0 and 0 not in s.shape}
    for name, param in model.named_parameters():
        spec = specs[name]
        if spec.group >= 0 and (spec.trained or case.listed):
            place = spec.group if spec.group in whole else min(whole)
            found[place]["params"].append(param)
    for group in found:
        places = list(range(len(group["params"])))
        if case.order == "mixed":
            places = torch.randperm(len(places)).tolist()
        elif case.order == "reversed":
            places.reverse()
        group["params"] = [group["params"][place] for place in places]
    return found


def _optimizer(case: Case, groups: list[dict[str, Any]]) -> Any:
    if case.optimizer in BUILT:
        home = importlib.import_module(f"deepspeed.ops.{BUILT[case.optimizer]}")
        return getattr(home, case.optimizer)(groups)
    more = {"momentum": 0.9} if case.optimizer in ("SGD", "RMSprop") else {}
    return getattr(torch.optim, case.optimizer)(groups, **more)


def held(case: Case, engine: Any) -> dict[str, Any]:
    """What the engine holds; collective.

    ``masters``: the fp32 value of each parameter that is optimized. ``weights``: each parameter as
    the model computes with it. ``buffers``: those that are saved. All by name, tied ones under each
    of their names; ``names`` are the lists of names of one parameter.
    """
    module = engine.module
    called: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        called.setdefault(id(param), []).append(name)
    weights: dict[str, torch.Tensor] = {}
    masters: dict[str, torch.Tensor] = {}
    for param in module.parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            value = param.detach().contiguous().clone()
        weights |= dict.fromkeys(called[id(param)], value)
    for param, value in _masters(case, engine):
        value = value.detach().contiguous().clone()
        masters |= dict.fromkeys(called[id(param)], value)
        shown = weights[called[id(param)][0]]
        if value.shape != shown.shape or not value.to(shown.dtype).equal(shown):
            raise AssertionError(f"{called[id(param)]}: the master does not round to the weight")
    unheld = [name for name in _optimized(case) if name not in masters and weights[name].numel()]
    if unheld:
        raise AssertionError(f"{unheld}: the engine holds no master of them")
    saved = module.state_dict().keys()
    buffers = {
        name: buffer.detach().contiguous().clone()
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if name in saved
    }
    return {
        "masters": masters,
        "weights": weights,
        "buffers": buffers,
        "names": list(called.values()),
    }


def _optimized(case: Case) -> set[str]:
    return {spec.path for spec in case.parameters if spec.trained and spec.group >= 0}


def _masters(case: Case, engine: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each optimized parameter that has elements with its live fp32 value.

    Stages 1 and 2 are gathered and cut by the optimizer's own flat order, because
    safe_get_full_fp32_param returns other parameters' values under round_robin_gradients; where it
    is right it must agree.
    """
    opt = engine.optimizer
    wanted = _optimized(case)
    optimized = [param for name, param in engine.module.named_parameters() if name in wanted]
    if case.stage == 0 and case.dtype == "fp32":
        yield from ((param, param) for param in optimized)
    elif hasattr(opt, "fp32_groups_flat"):
        for params, flat in zip(opt.fp16_groups, opt.fp32_groups_flat, strict=True):
            start = 0
            for param in params:
                yield param, flat[start : start + param.numel()].view_as(param)
                start += param.numel()
    elif hasattr(opt, "fp32_groups"):
        for params, masters in zip(opt.fp16_groups, opt.fp32_groups, strict=True):
            yield from zip(params, masters, strict=True)
    elif hasattr(opt, "round_robin_bit16_groups"):
        yield from _cut(opt, case)
    else:
        for param in optimized:
            if getattr(param, "ds_numel", param.numel()):
                yield param, safe_get_full_fp32_param(param)


def _cut(opt: Any, case: Case) -> Iterator[tuple[Any, torch.Tensor]]:
    """From the partitions of all ranks, by the offsets that the optimizer computes with."""
    for index, mine in enumerate(opt.single_partition_of_fp32_groups):
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.detach().contiguous())
        whole = torch.cat(parts)
        params, starts = opt.round_robin_bit16_groups[index], opt.round_robin_bit16_offsets[index]
        for param, start in zip(params, starts, strict=True):
            value = whole[start : start + param.numel()].view(param.shape)
            if not case.zero.get("round_robin_gradients") and param.numel():
                known = safe_get_full_fp32_param(param)
                if known is not None and not known.equal(value.float()):
                    raise AssertionError("the optimizer's flat order is not what it was read as")
            yield param, value
