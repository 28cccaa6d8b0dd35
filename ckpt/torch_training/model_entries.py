"""The entries of a model's state dict: what a load fills where it lies, and what modules compute.

Parameters and buffers are filled in place. What a module makes for its state dict alone
(``get_extra_state``, hooks) goes back through ``load_state_dict``, as torch does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

from ckpt.torch_training.training import TorchTraining


class Target(NamedTuple):
    """A tensor of the model, and all its names there."""

    value: torch.Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelEntries:
    """``computed`` are values by the key in the state dict, with what wrappers put into it."""

    targets: tuple[Target, ...]
    computed: Mapping[str, Any]

    @classmethod
    def of(cls, training: TorchTraining) -> ModelEntries:
        """The entries of the training's model."""
        module = training.module
        own_ids = {id(value) for value in chain(module.parameters(), module.buffers())}
        names: dict[int, list[str]] = {}
        values: dict[int, torch.Tensor] = {}
        computed: dict[str, Any] = {}
        for key, value in module.state_dict(keep_vars=True).items():
            if id(value) in own_ids:
                names.setdefault(id(value), []).append(training.name_of(key))
                values[id(value)] = value
            else:
                computed[key] = value

        targets = tuple(Target(values[key], tuple(names[key])) for key in names)
        return cls(targets, computed)
