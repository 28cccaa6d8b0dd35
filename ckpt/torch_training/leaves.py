"""The state dict of a training, leaf by leaf,
with the keys that torch's own functions give it.

    model.NAME                          parameters and persistent buffers
    optimizer.state.NAME.exp_avg        what the optimizer keeps for a parameter
    optimizer.param_groups.0.params     the names of a group's parameters
    optimizer.param_groups.0.lr         its options
    lr_scheduler.last_epoch             the scheduler's
    step                                the step of the save

So ``dcp.load`` loads it into ``{"model": ..., "optimizer": ...}`` of ``get_state_dict``.
That function itself would make a step of an optimizer that has made none, which is no
business of a save. Source: torch 2.13 ``distributed/checkpoint/state_dict.py``
(``_get_optim_state_dict``), ``_traverse.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ckpt.torch_training.training import TorchTraining
from converters.errors import CheckpointError

Path = tuple[str | int, ...]
MODEL, OPTIMIZER, SCHEDULER, STEP = "model", "optimizer", "lr_scheduler", "step"
STATE, GROUPS, PARAMS = "state", "param_groups", "params"


class StateLeaf(NamedTuple):
    """A tensor or another value under its path in the state dict."""

    path: Path
    value: Any

    @property
    def is_tensor(self) -> bool:
        """Whether it is stored as a tensor."""
        return isinstance(self.value, torch.Tensor)


def of_training(training: TorchTraining, step: int) -> list[StateLeaf]:
    """All leaves, in an order that is the same on all ranks.

    ``CheckpointError`` for a parameter of the optimizer that is not one of the model.
    """
    state_leaves = [*of_model(training)]
    if training.optimizer is not None:
        state_leaves += _of_optimizer(training)
    if training.lr_scheduler is not None:
        state_leaves += _flattened((SCHEDULER,), training.lr_scheduler.state_dict())
    state_leaves.append(StateLeaf((STEP,), int(step)))
    return state_leaves


def of_model(training: TorchTraining) -> Iterator[StateLeaf]:
    """Parameters and buffers under their names; a tied one under each of its names."""
    for name, value in training.module.state_dict(keep_vars=True).items():
        yield StateLeaf((MODEL, training.name_of(name)), value)


def group_names(training: TorchTraining) -> list[list[str]]:
    """The names of the parameters of each param group, in its order."""
    names = training.trained_names()
    groups = training.optimizer.param_groups
    unknown_shapes = [
        tuple(value.shape) for group in groups for value in group[PARAMS] if id(value) not in names
    ]
    if unknown_shapes:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {unknown_shapes[0]} that is not one of the "
            "model; make the optimizer of model.parameters(), after fully_shard",
            "output",
        )
    return [[names[id(value)] for value in group[PARAMS]] for group in groups]


def _of_optimizer(training: TorchTraining) -> Iterator[StateLeaf]:
    optimizer = training.optimizer
    names_by_group = group_names(training)
    for group, names in zip(optimizer.param_groups, names_by_group, strict=True):
        for value, name in zip(group[PARAMS], names, strict=True):
            state = optimizer.state.get(value, {})
            yield from _flattened((OPTIMIZER, STATE, name), state)

    for index, (group, names) in enumerate(
        zip(optimizer.param_groups, names_by_group, strict=True)
    ):
        path = (OPTIMIZER, GROUPS, index)
        yield StateLeaf((*path, PARAMS), names)
        for key, option in group.items():
            if key != PARAMS:
                yield StateLeaf((*path, key), option)


def _flattened(path: Path, value: Any) -> Iterator[StateLeaf]:
    """The leaves of nested dicts and lists, as ``flatten_state_dict`` finds them."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flattened((*path, str(key)), entry)
    elif isinstance(value, list) and not _is_leaf(value):
        for index, entry in enumerate(value):
            yield from _flattened((*path, index), entry)
    else:
        yield StateLeaf(path, value)


def _is_leaf(value: Any) -> bool:
    """Whether there is no tensor and no dict in a list, or in a list in it."""
    if isinstance(value, (Mapping, torch.Tensor)):
        return False
    return not isinstance(value, list) or all(map(_is_leaf, value))
