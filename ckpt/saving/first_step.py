"""What an optimizer will keep once it has made a step, worked out before it makes one.

Most optimizers make their state in the first step: Adam two values for each element, SGD one if it
has momentum, Adafactor a row and a column. Until then ``state_dict()`` holds none of it, and a
checkpoint seems to take a third of what it will. So the state is put in as tensors of the device
"meta", which have a type and a shape and no bytes.

torch's and transformers' optimizers are asked themselves: one step of a copy on such tensors.
bitsandbytes' have a function that makes the state. Of others, which may be kernels that read the
bytes, the class's name tells: DeepSpeed 0.19.8 ``ops/adam``, ``ops/lion``, ``ops/lamb``,
``ops/adagrad``.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

State = dict[str, Any]
PYTHON = ("torch.optim.", "transformers.")  # whose steps are made of torch's own operations
# Tensors of a parameter's size that the first optimizer keeps whose name has this in it.
KEPT = (("adagrad", 1), ("adan", 3), ("adam", 2), ("lamb", 2), ("lion", 1), ("rmsprop", 1))


@contextmanager
def stepped(optimizer: Any) -> Iterator[list[torch.Tensor]]:
    """In this block ``optimizer``, DeepSpeed's or torch's, has the state that it will have.

    Yields the tensors of that state which have no bytes yet. An optimizer that has state already
    keeps that; after the block all is as before.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    state = getattr(inner, "state", None)
    if not isinstance(state, dict) or any(state.values()):
        yield []
        return
    ahead: Any = defaultdict(dict, state)
    known: dict[Any, State] = {}
    for group, param in _parameters(optimizer, inner):
        if not param.numel():
            continue
        key = id(group), param.shape, param.dtype
        if key not in known:
            known[key] = state_of(inner, group, param)
        ahead[param] = _like(known[key])
    held = [value for state in ahead.values() for value in state.values()]
    inner.state = ahead
    try:
        yield [value for value in held if torch.is_tensor(value) and value.is_meta]
    finally:
        inner.state = state


def state_of(inner: Any, group: dict[str, Any], param: torch.Tensor) -> State:
    """The state of a parameter after a step, its tensors on "meta"; empty if that is not known."""
    kind = type(inner)
    where = f"{inspect.unwrap(kind.step).__module__}."
    with torch.no_grad():
        fake = torch.nn.Parameter(torch.empty_like(param, device="meta"), False)
        if where.startswith(PYTHON):
            return _after_step(inner, group, fake)
        if where.startswith("bitsandbytes."):
            return _of_bitsandbytes(inner, group, fake)
        return _by_name(kind.__name__.lower(), group, fake)


def growth(inner: Any) -> float:
    """Bytes of a large parameter and its state after a step, for each byte of the parameter."""
    param = torch.empty(1 << 20, device="meta")
    held = state_of(inner, inner.param_groups[0], param).values()
    return 1 + sum(value.nbytes for value in held if torch.is_tensor(value)) / param.nbytes


def _parameters(optimizer: Any, inner: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Each parameter that the step will see, with its group. ZeRO-3 hands them over one by one."""
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        groups = optimizer.sub_group_to_group_id
        yield from ((inner.param_groups[groups[index]], held) for index, held in enumerate(flat))
        return
    for group in inner.param_groups:
        for param in group["params"]:
            if optimizer is not inner or param.requires_grad:  # its own copies need not say so
                yield group, param


def _copy_of(inner: Any, group: dict[str, Any], fake: torch.Tensor) -> Any:
    """The optimizer with this parameter alone, no state, and nobody who is told of its steps."""
    copy = object.__new__(type(inner))
    copy.__dict__.update(inner.__dict__)
    for name in [name for name in copy.__dict__ if name.endswith("_hooks")]:
        copy.__dict__[name] = OrderedDict()
    copy.__dict__.pop("step", None)  # a scheduler's
    copy.state = defaultdict(dict)
    copy.param_groups = [{**group, "params": [fake], "foreach": False, "fused": False}]
    return copy


def _after_step(inner: Any, group: dict[str, Any], fake: torch.Tensor) -> State:
    copy = _copy_of(inner, group, fake)
    fake.grad = torch.empty_like(fake)
    with suppress(Exception):  # a value of no bytes was asked for; the state is there by then
        inspect.unwrap(type(inner).step)(copy)
    return dict(copy.state.get(fake, {}))


def _of_bitsandbytes(inner: Any, group: dict[str, Any], fake: torch.Tensor) -> State:
    copy = _copy_of(inner, group, fake)
    copy.is_paged = False  # it would take memory of a device
    copy.name2qmap = dict(getattr(inner, "name2qmap", {}))
    with suppress(Exception):
        copy.init_state(copy.param_groups[0], fake, 0, 0)
    return dict(copy.state.get(fake, {}))


def _by_name(name: str, group: dict[str, Any], fake: torch.Tensor) -> State:
    count = next((count for part, count in KEPT if part in name), 0)
    if not count and ("sgd" in name or "muon" in name):
        count = 1 if group.get("momentum") else 0
    return {str(index): torch.empty_like(fake) for index in range(count)}


def _like(state: State) -> State:
    """The same for another parameter: its tensors are its own."""
    return {
        name: torch.empty_like(value) if torch.is_tensor(value) else value
        for name, value in state.items()
    }
