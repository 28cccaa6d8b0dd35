"""The optimizer's state by the names of parameters, and its groups.

    state         NAME -> exp_avg, exp_avg_sq, step (a tensor of one number), ...
    param_groups  N -> lr, betas, ..., params (the names);  flattened: NAME -> lr, betas, ...

Source: torch 2.13 ``distributed/checkpoint/state_dict.py`` (``_get_optim_state_dict``,
``_flatten_optim_state_dict``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from converters.dcp.boxes import LocatedTensor
from converters.dcp.checkpoint import ParameterGroup
from converters.dcp.keys import layouts
from converters.dcp.keys.layouts import OptimizerLeaves, StateLayout
from converters.dcp.keys.leaves import Leaf
from converters.dcp.keys.model_roots import without_wrappers
from converters.dcp.saved_state import SavedState, number_of
from converters.errors import CheckpointError
from converters.tensors import TensorRef

_NAMES, _STEP = "params", "step"
_NO_ALIASES: Mapping[str, str] = {}


class SavedOptimizer:
    """An optimizer's leaves, and the files that they lie in."""

    def __init__(self, state: SavedState, leaves: OptimizerLeaves):
        self.state = state
        self.leaves = leaves
        self.tensor_names = frozenset(leaf.name for leaf in state.leaves if leaf.is_tensor)

    @classmethod
    def beside(cls, state: SavedState, model: StateLayout) -> SavedOptimizer:
        """The optimizer of a model that was saved apart from it."""
        is_root = any(leaf.keys[0] in (layouts.STATE, layouts.GROUPS) for leaf in state.leaves)
        under_one_key = [leaf._replace(keys=("optimizer", *leaf.keys)) for leaf in state.leaves]
        names = [Leaf(name, ("model", name), True) for name in model.model]
        leaves = [*(under_one_key if is_root else state.leaves), *names]
        return cls(state, layouts.split(leaves, state.folder).optimizer)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it keeps states of."""
        return tuple(self.leaves.states)

    @property
    def leaf_names(self) -> list[str]:
        """All its leaves."""
        parts = (*self.leaves.states.values(), *self.leaves.groups.values())
        return [leaf for part in parts for leaf in part.values()]

    def of_parameter(
        self, name: str, aliases: Mapping[str, str] = _NO_ALIASES
    ) -> dict[str, TensorRef | int | float]:
        """See ``source.OptimizerState``; ``aliases`` are names that are tied to others."""
        if not self.leaves.are_named:
            raise CheckpointError(
                f"{self.state.folder} has the optimizer's states under numbers, not under names "
                "of parameters; save them with torch.distributed.checkpoint.state_dict."
                "get_state_dict",
                "unsupported",
            )
        name = aliases.get(name, name)
        if name not in self.leaves.states:
            raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")

        values = {
            key: value
            for key, leaf in self.leaves.states[name].items()
            if (value := self._value(leaf)) is not None
        }
        # the state of a parameter without axes has none either; a step never has
        has_axes = any(isinstance(v, TensorRef) and v.shape for v in values.values())
        return {
            key: _as_number(value) if has_axes or key == _STEP else value
            for key, value in values.items()
        }

    def located(self, name: str) -> dict[str, LocatedTensor]:
        """Every tensor that is kept for a parameter, as it lies in the files; none where
        the optimizer keeps no state for it, such as for one without a gradient so far."""
        leaves = self.leaves.states.get(name, {})
        return {
            key: self.state.tensor(leaf)
            for key, leaf in leaves.items()
            if leaf in self.tensor_names
        }

    def groups(self) -> tuple[ParameterGroup, ...]:
        """The groups in their order;
        parameters with the same flattened hyperparameters are one."""
        values = {
            owner: {key: self._plain(leaf) for key, leaf in fields.items()}
            for owner, fields in self.leaves.groups.items()
        }
        if all(owner.isdecimal() for owner in values):
            return tuple(
                ParameterGroup(
                    tuple(self._name(str(name)) for name in fields.get(_NAMES) or ()),
                    {key: value for key, value in fields.items() if key != _NAMES},
                )
                for _, fields in sorted(values.items(), key=lambda item: int(item[0]))
            )

        return _grouped(values)

    def _name(self, name: str) -> str:
        """A name in a group as the states have it,
        which may have other pieces of wrappers."""
        if name in self.leaves.states:
            return name
        return self._names_by_short_name.get(without_wrappers(name), name)

    @cached_property
    def _names_by_short_name(self) -> dict[str, str]:
        names = self.leaves.states
        counts = Counter(map(without_wrappers, names))
        return {short: name for name in names if counts[short := without_wrappers(name)] == 1}

    def _value(self, leaf: str) -> TensorRef | int | float | None:
        if leaf not in self.tensor_names:
            value = self.state.value(leaf)
            return value if isinstance(value, (int, float, TensorRef)) else None

        return self.state.tensor(leaf).tensor

    def _plain(self, leaf: str) -> Any:
        if leaf not in self.tensor_names:
            return self.state.value(leaf)
        tensor = self.state.tensor(leaf).tensor
        return tensor if tensor is None or tensor.numel != 1 else number_of(tensor)


def _as_number(value: TensorRef | int | float) -> TensorRef | int | float:
    """The number in a tensor without axes, whole if it is; other values as they are."""
    if not isinstance(value, TensorRef) or value.shape:
        return value
    number = number_of(value)
    if number is None:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _grouped(values: Mapping[str, Mapping[str, Any]]) -> tuple[ParameterGroup, ...]:
    """Flattened hyperparameters as groups: of parameters that have the same."""
    names_by_options: dict[str, list[str]] = {}
    options: dict[str, Mapping[str, Any]] = {}
    for name, fields in values.items():
        fingerprint = repr(sorted(fields.items()))
        names_by_options.setdefault(fingerprint, []).append(name)
        options[fingerprint] = fields

    return tuple(
        ParameterGroup(tuple(names), options[fingerprint])
        for fingerprint, names in names_by_options.items()
    )


def trained_names(optimizer: SavedOptimizer | None, names: Iterable[str]) -> frozenset[str]:
    """Those of some parameters that an optimizer keeps states of."""
    if optimizer is None or not optimizer.leaves.are_named:
        return frozenset()
    return frozenset(name for name in names if name in optimizer.leaves.states)
