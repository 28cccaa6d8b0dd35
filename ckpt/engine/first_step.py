"""The state that an optimizer will keep once it has made a step,
worked out before it makes one.

Most optimizers make their state in the first step: Adam two values for each element,
SGD one if it has momentum, Adafactor a row and a column. Until then ``state_dict()``
holds none of it, and a checkpoint seems to take a third of what it will. So the state
is put in as tensors of the device "meta", which have a type and a shape and no bytes.

torch's and transformers' optimizers are asked themselves: one step of a copy on such
tensors. bitsandbytes' have a function that makes the state. Of others, which may be
kernels that read the bytes, the class's name tells: DeepSpeed 0.19.8 ``ops/adam``,
``ops/lion``, ``ops/lamb``, ``ops/adagrad``.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

State = dict[str, Any]
# Modules whose optimizers' steps are made of torch's own operations.
PYTHON = ("torch.optim.", "transformers.")
# Tensors of a parameter's size that the first optimizer keeps whose name has this in it.
KEPT = (
    ("adagrad", 1),
    ("adan", 3),
    ("adam", 2),
    ("lamb", 2),
    ("lion", 1),
    ("rmsprop", 1),
)


@contextmanager
def stepped(optimizer: Any) -> Iterator[list[torch.Tensor]]:
    """In this block ``optimizer``, DeepSpeed's or torch's,
    has the state that it will have.

    Yields the tensors of that state which have no bytes yet. An optimizer that has
    state already keeps that; after the block all is as before.
    """
    inner_optimizer = getattr(optimizer, "optimizer", optimizer)
    state = getattr(inner_optimizer, "state", None)
    if not isinstance(state, dict) or any(state.values()):
        yield []
        return

    future_state: Any = defaultdict(dict, state)
    states_by_kind: dict[Any, State] = {}

    for group, param in _parameters(optimizer, inner_optimizer):
        if not param.numel():
            continue
        key = id(group), param.shape, param.dtype
        if key not in states_by_kind:
            states_by_kind[key] = state_of(inner_optimizer, group, param)
        future_state[param] = _for_another(states_by_kind[key])

    values = [value for state in future_state.values() for value in state.values()]
    inner_optimizer.state = future_state

    try:
        yield [value for value in values if torch.is_tensor(value) and value.is_meta]
    finally:
        inner_optimizer.state = state


def state_of(inner_optimizer: Any, group: dict[str, Any], param: torch.Tensor) -> State:
    """The state of a parameter after a step,
    its tensors on "meta"; empty if that is not known."""
    kind = type(inner_optimizer)
    module_name = f"{inspect.unwrap(kind.step).__module__}."

    with torch.no_grad():
        placeholder = torch.nn.Parameter(torch.empty_like(param, device="meta"), False)
        if module_name.startswith(PYTHON):
            return _state_after_step(inner_optimizer, group, placeholder)
        if module_name.startswith("bitsandbytes."):
            return _bitsandbytes_state(inner_optimizer, group, placeholder)
        return _state_by_name(kind.__name__.lower(), group, placeholder)


def growth(inner_optimizer: Any) -> float:
    """Bytes of a large parameter and its state after a step,
    for each byte of the parameter."""
    param = torch.empty(1 << 20, device="meta")
    state = state_of(inner_optimizer, inner_optimizer.param_groups[0], param)
    tensors = (value for value in state.values() if torch.is_tensor(value))
    return 1 + sum(tensor.nbytes for tensor in tensors) / param.nbytes


def _parameters(
    optimizer: Any, inner_optimizer: Any
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Each parameter that the step will see,
    with its group. ZeRO-3 hands them over one by one."""
    flat_groups = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if flat_groups is not None:
        group_indices = optimizer.sub_group_to_group_id
        yield from (
            (inner_optimizer.param_groups[group_indices[index]], vector)
            for index, vector in enumerate(flat_groups)
        )
        return

    for group in inner_optimizer.param_groups:
        for param in group["params"]:
            # DeepSpeed's own copies need not say that they are trained.
            if optimizer is not inner_optimizer or param.requires_grad:
                yield group, param


def _copy_of(
    inner_optimizer: Any,
    group: dict[str, Any],
    placeholder: torch.Tensor,
) -> Any:
    """The optimizer with this parameter alone, no state,
    and nobody who is told of its steps."""
    copy = object.__new__(type(inner_optimizer))
    copy.__dict__.update(inner_optimizer.__dict__)
    for name in [name for name in copy.__dict__ if name.endswith("_hooks")]:
        copy.__dict__[name] = OrderedDict()
    copy.__dict__.pop("step", None)  # a scheduler's
    copy.state = defaultdict(dict)
    options = {"params": [placeholder], "foreach": False, "fused": False}
    copy.param_groups = [{**group, **options}]
    return copy


def _state_after_step(
    inner_optimizer: Any, group: dict[str, Any], placeholder: torch.Tensor
) -> State:
    copy = _copy_of(inner_optimizer, group, placeholder)
    placeholder.grad = torch.empty_like(placeholder)
    # A step may ask for a value, which a tensor of "meta" has not; the state is there by
    # then.
    with suppress(Exception):  # of any class that a training may use
        inspect.unwrap(type(inner_optimizer).step)(copy)
    return dict(copy.state.get(placeholder, {}))


def _bitsandbytes_state(
    inner_optimizer: Any, group: dict[str, Any], placeholder: torch.Tensor
) -> State:
    copy = _copy_of(inner_optimizer, group, placeholder)
    copy.is_paged = False  # it would take memory of a device
    copy.name2qmap = dict(getattr(inner_optimizer, "name2qmap", {}))
    with suppress(Exception):  # of a class of bitsandbytes; what is not there is not counted
        copy.init_state(copy.param_groups[0], placeholder, 0, 0)
    return dict(copy.state.get(placeholder, {}))


def _state_by_name(name: str, group: dict[str, Any], placeholder: torch.Tensor) -> State:
    count = next((count for name_part, count in KEPT if name_part in name), 0)
    if not count and ("sgd" in name or "muon" in name):
        count = 1 if group.get("momentum") else 0
    return {str(index): torch.empty_like(placeholder) for index in range(count)}


def _for_another(state: State) -> State:
    """A state of the same kind for another parameter, with tensors of its own."""
    return {
        name: torch.empty_like(value) if torch.is_tensor(value) else value
        for name, value in state.items()
    }
