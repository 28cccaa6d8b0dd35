"""An optimizer as a record knows it: its algorithm and the options of its param groups.

What is saved of an optimizer comes back with the options that it had: after
``load_state_dict`` of torch 2.13 the param groups are those of the checkpoint, whatever
the script gave. ``override`` gives chosen options back; the learning rate goes through
the scheduler, which has its own copy.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ckpt.engine.view import EngineView
from ckpt.state.jsonable import jsonable
from converters.errors import CheckpointError

# Options that say how a step is computed, not what comes of it; and what is not an
# option.
ASIDE = {
    *("params", "param_names", "step", "foreach", "fused"),
    *("capturable", "differentiable"),
    *("use_muon", "ns_method", "moe", "name"),
}
# Options that one algorithm has and others do not.
TELLING = {
    *("betas", "momentum", "momentum_decay", "alpha", "rho", "etas"),
    *("lr_decay", "beta2_decay"),
}
LR = "lr"
BASE = "initial_lr"  # the rate that a scheduler of torch starts from


def inner(engine: EngineView) -> Any:
    """The optimizer that steps, out of DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def algorithm(optimizer: Any) -> str:
    """The algorithm of an optimizer,
    whoever implements it: the class differs with offload.

    Source: DeepSpeed 0.19.8 ``ops/adam/cpu_adam.py``, ``fused_adam.py``
    (``adam_w_mode``), ``ops/lion``; torch 2.13 ``optim/adam.py``
    (``decoupled_weight_decay``).
    """
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    root = type(optimizer).__module__.partition(".")[0]
    if root == "bitsandbytes":
        return f"{root} {names[0]}"

    mode = getattr(optimizer, "adam_w_mode", None)
    if {"FusedAdam", "DeepSpeedCPUAdam"} & set(names) and mode is not None:
        return "AdamW" if mode else "Adam"
    if {"Adam", "AdamW"} & set(names):
        decoupled = getattr(optimizer, "defaults", {}).get("decoupled_weight_decay")
        return "AdamW" if "AdamW" in names or decoupled else "Adam"

    if any(name.endswith("Lion") for name in names):
        return "Lion"

    return f"{root} {names[0]}" if names[0] == "Adafactor" else names[0]


def has_states_of(saved: str, current: str) -> bool:
    """Whether two algorithms keep the same states,
    so that one could go on with the other's."""
    return saved == current or {saved, current} == {"Adam", "AdamW"}


def adds_states(algorithm_name: str, option: str, saved: Any, current: Any) -> bool:
    """Whether an option, as it is now, makes an optimizer keep states that it had none of
    as it was saved: its next step would miss them.

    Source: torch 2.13 ``optim/adam.py``, ``optim/rmsprop.py`` (``_init_group``). SGD begins
    with a new momentum.
    """
    has_states = option in ("amsgrad", "centered")
    has_states |= option == "momentum" and algorithm_name == "RMSprop"
    return has_states and bool(current) and not saved


def options(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options of each param group, as JSON."""
    return [
        {name: jsonable(value) for name, value in group.items() if name not in ASIDE}
        for group in groups
    ]


def record(optimizer: Any) -> dict[str, Any]:
    """The entry of a manifest on an optimizer."""
    return {
        "class": type(optimizer).__name__,
        "algorithm": algorithm(optimizer),
        "groups": options(optimizer.param_groups),
    }


def given(optimizer: Any) -> list[dict[str, Any]]:
    """The options as the script gave them, to be looked at before anything is loaded."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def require_known(
    override: Collection[str],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """``CheckpointError`` unless each name
    in ``override`` is an option of a param group."""
    option_names = sorted({name for group in groups for name in group} - ASIDE - {BASE})
    for name in override:
        if name not in option_names:
            raise CheckpointError(
                f"override: {name!r} is not an option of the optimizer's param groups; "
                f"they have {', '.join(option_names)}",
                "refused",
            )


def require_options(
    engine: EngineView,
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    new_optimizer: str | None,
) -> None:
    """``CheckpointError`` if the optimizer's state
    in a file has not what this optimizer needs.

    For checkpoints that note no optimizer; ``state`` is what the file holds,
    ``new_optimizer`` how to begin with a new optimizer.
    """
    if engine.optimizer is None or "load_state_dict" in vars(engine.optimizer):
        return  # the weights alone are taken

    saved = next(_saved_groups(state), None)
    if not saved:
        return

    optimizer = inner(engine)
    missing_options = sorted((TELLING & set(optimizer.param_groups[0])) - set(saved[0]))
    if missing_options:
        alternative = ""
        if new_optimizer:
            alternative = f", or {new_optimizer} to begin with a new one"
        raise CheckpointError(
            f"{path}: it was saved by another optimizer: its param groups have no "
            f"{missing_options[0]}, which {type(optimizer).__name__} needs; use the "
            f"optimizer that it was saved with{alternative}",
            "refused",
        )


def _saved_groups(state: Mapping[str, Any]) -> Iterator[Any]:
    """The param groups in a file of stage 0 (``optimizer``), 1, 2 or 3."""
    for name in ("optimizer_state_dict", "optimizer"):
        optimizer_state = state.get(name)
        if isinstance(optimizer_state, Mapping):
            base_state = optimizer_state.get("base_optimizer_state")
            inner_state = optimizer_state.get("optimizer_state_dict")
            for candidate in (base_state, inner_state, optimizer_state):
                if not isinstance(candidate, Mapping):
                    continue
                if isinstance(candidate.get("param_groups"), list):
                    yield candidate["param_groups"]


def complete(optimizer: Any, script_groups: Sequence[Mapping[str, Any]]) -> None:
    """Turns a state that another class
    of the same algorithm saved into one of this class."""
    for group, options in zip(optimizer.param_groups, script_groups, strict=False):
        for name, value in options.items():
            group.setdefault(name, value)
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if names & {"FusedAdam", "DeepSpeedCPUAdam", "FusedLion", "DeepSpeedCPULion"}:
        # they count in whole numbers, torch in tensors
        for state in optimizer.state.values():
            if isinstance(state, dict) and isinstance(state.get("step"), torch.Tensor):
                state["step"] = int(state["step"].item())


def override(
    optimizer: Any,
    scheduler: Any,
    script_groups: Sequence[Mapping[str, Any]],
    names: Collection[str],
) -> None:
    """Gives the named options back their values in ``script_groups``,
    from the next step on."""
    for group, options in zip(optimizer.param_groups, script_groups, strict=False):
        for name in names:
            if name != LR and name in options:
                group[name] = options[name]
    if LR in names:
        _override_rates(optimizer, unwrapped(scheduler), script_groups)


def restart_rates(optimizer: Any, script_groups: Sequence[Mapping[str, Any]]) -> None:
    """Sets the learning rates from before the load: the scheduler starts over."""
    for group, options in zip(optimizer.param_groups, script_groups, strict=False):
        group |= {name: options[name] for name in (LR, BASE) if name in options}


def set_rates(optimizer: Any, rates: Iterable[float]) -> None:
    """Sets the learning rate of each param group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group[LR] = rate


def unwrapped(scheduler: Any) -> Any:
    """A scheduler out of Accelerate's wrapper."""
    if hasattr(scheduler, "scheduler") and hasattr(scheduler, "split_batches"):
        return scheduler.scheduler
    return scheduler


def _override_rates(
    optimizer: Any, scheduler: Any, script_groups: Sequence[Mapping[str, Any]]
) -> None:
    groups = optimizer.param_groups
    old_bases = [group.get(BASE, group[LR]) for group in groups]
    bases = [options.get(BASE, options[LR]) for options in script_groups]
    for group, base in zip(groups, bases, strict=False):
        if BASE in group or scheduler is not None:
            group[BASE] = base

    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if scheduler is None or isinstance(scheduler, plateau):
        rates = bases
    elif type(scheduler).__module__.startswith("deepspeed"):
        # its rates are its own options, which are not loaded
        rates = list(scheduler.get_lr())
    else:
        _set_bases(scheduler, bases)
        rates = _current_rates(scheduler, groups, old_bases, bases)

    set_rates(optimizer, rates)
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = list(rates)


def _set_bases(scheduler: Any, bases: list[float]) -> None:
    """Sets the base rates, in a scheduler of schedulers (``SequentialLR``) in each."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = list(bases)
    for inner_scheduler in getattr(scheduler, "_schedulers", ()):
        _set_bases(inner_scheduler, bases)


def _current_rates(
    scheduler: Any, groups: Any, old_bases: list[float], bases: list[float]
) -> list[float]:
    """What the schedule gives at this step from other base rates.

    By the scheduler's own formula where it has one, else in proportion.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        epoch = scheduler.last_epoch
        factors = zip(scheduler.lr_lambdas, bases, strict=False)
        return [base * factor(epoch) for factor, base in factors]
    if hasattr(scheduler, "_get_closed_form_lr"):
        return list(scheduler._get_closed_form_lr())
    rates = zip(groups, old_bases, bases, strict=False)
    return [group[LR] * base / old_base if old_base else base for group, old_base, base in rates]
