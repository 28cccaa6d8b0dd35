"""The state dict of a training, leaf by leaf,
with the keys that torch's own functions give it.

    model.NAME                          parameters and persistent buffers
    model.NAME._extra_state             what a module's ``get_extra_state`` gives
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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from ckpt.torch_training import plain_values
from ckpt.torch_training.training import TorchTraining
from converters.dcp.writing.metadata import dotted
from converters.errors import CheckpointError
from converters.words import with_article

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

    ``CheckpointError`` for a parameter of the optimizer that is not one of the model, and
    for what would not come back as it is.
    """
    state_leaves = [*of_model(training)]
    if training.optimizer is not None:
        state_leaves += _of_optimizer(training)
    if training.lr_scheduler is not None and (state := training.lr_scheduler.state_dict()):
        state_leaves += _flattened((SCHEDULER,), state)
    state_leaves.append(StateLeaf((STEP,), int(step)))
    return _with_plain_values(state_leaves)


def _with_plain_values(state_leaves: Sequence[StateLeaf]) -> list[StateLeaf]:
    """The same leaves; ``CheckpointError`` for two of one name and for values that do not
    come back. The scheduler's are saved once more beside them."""
    counts = Counter(dotted(leaf.path) for leaf in state_leaves)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise CheckpointError(
            f"the state has two entries that a distributed checkpoint calls {name}; give one of "
            "them another name",
            "unsupported",
        )
    return [
        leaf
        if leaf.is_tensor or leaf.path[0] == SCHEDULER
        else StateLeaf(leaf.path, plain_values.stored_form(leaf.path, leaf.value))
        for leaf in state_leaves
    ]


def of_model(training: TorchTraining) -> Iterator[StateLeaf]:
    """Parameters, buffers and extra state under their names; a tied one under each of its
    names."""
    for name, value in training.module.state_dict(keep_vars=True).items():
        yield from _flattened_with_texts((MODEL, training.name_of(name)), value)


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
    names_by_group = group_names(training)
    state_dict = _optimizer_state_dict(training.optimizer)
    for number, name in enumerate(chain.from_iterable(names_by_group)):
        state = state_dict[STATE].get(number)
        if state:
            yield from _flattened_with_texts((OPTIMIZER, STATE, name), state)

    for index, group in enumerate(state_dict[GROUPS]):
        path = (OPTIMIZER, GROUPS, index)
        yield StateLeaf((*path, PARAMS), names_by_group[index])
        for key, option in group.items():
            if key != PARAMS:
                yield from _flattened_with_texts((*path, key), option)


def _optimizer_state_dict(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The optimizer's own state dict, states by the numbers of parameters.

    ``CheckpointError`` where it has more than states of parameters and groups, which torch's
    ``get_state_dict`` has not either.
    """
    label = with_article(type(optimizer).__name__)
    known_ids = {id(value) for group in optimizer.param_groups for value in group[PARAMS]}
    if any(id(key) not in known_ids for key in optimizer.state):
        raise _surplus(f"{label} keeps a state that is of none of the parameters in its groups")

    state_dict = optimizer.state_dict()
    surplus = [key for key in state_dict.get(STATE, ()) if key not in range(len(known_ids))]
    surplus += [key for key in state_dict if key not in (STATE, GROUPS)]
    if surplus:
        raise _surplus(f"{label} puts {surplus[0]!r} into its state_dict()")
    return state_dict


def _surplus(problem: str) -> CheckpointError:
    return CheckpointError(
        f"{problem}; ckpt.Saver saves states of parameters and options of groups, as torch's "
        "get_state_dict does: keep the rest in an object of your own, and pass that as extra",
        "unsupported",
    )


def _flattened_with_texts(path: Path, value: Any) -> Iterator[StateLeaf]:
    _require_texts(path, value)
    return _flattened(path, value)


def _require_texts(path: Path, value: Any) -> None:
    """``CheckpointError`` for a key of a dict that a checkpoint would turn into another."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if type(key) is not str or not key or key.isdecimal():
                raise CheckpointError(
                    f"{dotted(path)} has an entry under {key!r}, which would come back under "
                    "another key or in a list; ckpt.Saver saves dicts whose keys are texts, "
                    "and no numbers",
                    "unsupported",
                )
            _require_texts((*path, key), entry)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _require_texts((*path, index), entry)


def _flattened(path: Path, value: Any) -> Iterator[StateLeaf]:
    """The leaves of nested dicts and lists, as ``flatten_state_dict`` finds them; and an
    empty dict, which it leaves out."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flattened((*path, str(key)), entry)
    elif isinstance(value, list) and not _is_leaf(value):
        for index, entry in enumerate(value):
            yield from _flattened((*path, index), entry)
    else:
        yield StateLeaf(path, {} if isinstance(value, Mapping) else value)


def _is_leaf(value: Any) -> bool:
    """Whether there is no tensor and no dict in a list, or in a list in it."""
    if isinstance(value, (Mapping, torch.Tensor)):
        return False
    return not isinstance(value, list) or all(map(_is_leaf, value))
