"""Options of a param group as torch's own optimizers have them.

``dcp.load`` asks for every option that the optimizer of whoever loads has, and refuses
to load without one. DeepSpeed's optimizers lack some (``foreach``, ``fused``, ...):
these are written as torch has them by default. More options than are asked for do no
harm.

Source: ``defaults`` of the optimizers in ``torch/optim`` of torch 2.3 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from converters.dcp.writing.items import PlainObject
from converters.errors import MalformedError
from converters.pickles.values import Call
from converters.zero.checkpoint import Checkpoint
from converters.zero.param_groups import ParamGroup
from converters.zero.universal.parameter_folders import number

_OF_ANY = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
_ADAM_STATES = {"exp_avg", "exp_avg_sq"}
_SCALARS = (bool, int, float, str, bytes, type(None))


class GroupOptions(NamedTuple):
    """The options of a param group by name, and lines on what does not cross."""

    values: Mapping[str, PlainObject]
    omissions: tuple[str, ...]


def of_group(checkpoint: Checkpoint, group: ParamGroup, index: int) -> GroupOptions:
    """The options of a param group, completed; ``index`` is its number."""
    if group.options is None:
        lack = (
            "elastic_checkpoint keeps no options of param groups (lr, betas, ...), and dcp.load "
            "refuses to load an optimizer without them: set them by hand, and load with "
            "DefaultLoadPlanner(allow_partial_load=True)"
        )
        return GroupOptions({}, (lack,))

    options = plain(group.options, index)
    missing = {key: PlainObject(value) for key, value in _missing(checkpoint, group, index)}
    return options._replace(values={**missing, **options.values})


def plain(options: Mapping[str, Any], index: int) -> GroupOptions:
    """Those of a group's options that are plain values; ``index`` is the group's number."""
    values: dict[str, PlainObject] = {}
    unknown_keys: list[str] = []
    for key, node in options.items():
        value = _plain(node)
        if isinstance(key, str) and is_plain(value):
            values[key] = PlainObject(value)
        else:
            unknown_keys.append(str(key))

    omissions = tuple(
        f"{key} of param group {index} is no plain value, and is left out" for key in unknown_keys
    )
    return GroupOptions(values, omissions)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, or a tuple or list of such."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(member, _SCALARS) for member in value)
    return isinstance(value, _SCALARS)


def _plain(node: Any) -> Any:
    """A learning rate that is a tensor, as ``capturable`` has it, as a number."""
    if not isinstance(node, Call):
        return node
    try:
        value = number(node)
    except MalformedError:
        return node
    return node if value is None else value


def _missing(checkpoint: Checkpoint, group: ParamGroup, index: int) -> Iterator[tuple[str, Any]]:
    """What torch has by default, or what the run's configuration says."""
    yield from _OF_ANY.items()
    if group.values.keys() >= _ADAM_STATES:
        yield "amsgrad", False
        yield "decoupled_weight_decay", _decouples_weight_decay(checkpoint)

    base_rate = _base_rate(checkpoint, index)
    if base_rate is None:
        base_rate = _plain((group.options or {}).get("lr"))
    if isinstance(base_rate, (int, float)):
        yield "initial_lr", base_rate


def _decouples_weight_decay(checkpoint: Checkpoint) -> bool:
    """Whether an Adam of DeepSpeed works as AdamW,
    which it does unless it is told otherwise.

    Source: DeepSpeed 0.19.8 ``runtime/engine.py: _configure_basic_optimizer``.
    """
    return checkpoint.model.setting("optimizer", "params", "adam_w_mode") is not False


def _base_rate(checkpoint: Checkpoint, index: int) -> float | None:
    """The learning rate that a scheduler began with, where the checkpoint has its state."""
    scheduler = checkpoint.model.root.get("lr_scheduler")
    rates = scheduler.get("base_lrs") if isinstance(scheduler, dict) else None
    if not isinstance(rates, list) or index >= len(rates):
        return None
    return rates[index] if isinstance(rates[index], (int, float)) else None
