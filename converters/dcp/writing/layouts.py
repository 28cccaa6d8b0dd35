"""The folders and keys that readers of DCP have for a training state.

    plain        model.NAME; optimizer.state.NAME.exp_avg, optimizer.param_groups.0.lr
    accelerate   the same, the model in pytorch_model_fsdp_0/, the optimizer in optimizer_0/
    torchtitan   NAME; optimizer.state.NAME.exp_avg, optimizer.param_groups.NAME.lr;
                 train_state.step

Sources: torch 2.13 ``distributed/checkpoint/state_dict.py: get_optimizer_state_dict``,
nested and with ``flatten_optimizer_state_dict``; accelerate 1.15
``utils/fsdp_utils.py``, which the Trainer calls, too; torchtitan 0.3
``components/checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from converters.dcp.writing.crossing_state import CrossingState, OptimizerGroup
from converters.dcp.writing.folder import OPTIMIZER, StateEntry
from converters.dcp.writing.items import PlainObject

LayoutName = Literal["plain", "accelerate", "torchtitan"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
MODEL_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0/", "optimizer_0/"


def folders(state: CrossingState, layout: LayoutName) -> dict[str, list[StateEntry]]:
    """The entries of each folder of DCP; its name ends in "/",
    or is empty for the output."""
    if layout == "torchtitan":
        model = [StateEntry((name,), tensor) for name, tensor in state.weights.items()]
        return {"": [*model, *_flat_optimizer(state)]}

    model = [StateEntry(("model", name), tensor) for name, tensor in state.weights.items()]
    optimizer = [*_nested_optimizer(state)]
    if layout == "plain":
        return {"": [*model, *optimizer]}
    return {MODEL_FOLDER: model} | ({OPTIMIZER_FOLDER: optimizer} if optimizer else {})


def _nested_optimizer(state: CrossingState) -> Iterator[StateEntry]:
    """States by parameter, and options by the number of the group, with its parameters."""
    for group in state.groups:
        for name, values in group.states.items():
            for key, value in values.items():
                yield StateEntry((OPTIMIZER, "state", name, key), value)

    for index, group in enumerate(state.groups):
        path = (OPTIMIZER, "param_groups", index)
        yield StateEntry((*path, "params"), PlainObject([*group.names]))
        for key, option in group.options.items():
            yield StateEntry((*path, key), option)


def _flat_optimizer(state: CrossingState) -> Iterator[StateEntry]:
    """States and options by parameter; each key is one name."""
    for group in state.groups:
        for name, values in group.states.items():
            for key, value in values.items():
                yield StateEntry((OPTIMIZER, f"state.{name}.{key}"), value)
        yield from _flat_options(group)


def _flat_options(group: OptimizerGroup) -> Iterator[StateEntry]:
    for name in group.names:
        for key, option in group.options.items():
            yield StateEntry((OPTIMIZER, f"param_groups.{name}.{key}"), option)
