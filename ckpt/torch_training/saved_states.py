"""The states of a training in a folder of DCP: of its model, by name, and of its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.engine.parameters import new_name
from ckpt.torch_training import plain_values
from ckpt.torch_training.nesting import StoredLeaf, keys_below, nest
from converters.dcp.dcp_state import DcpState
from converters.dcp.entries.description import StoredTensor
from converters.dcp.keys import layouts
from converters.dcp.keys.leaves import KeyPath
from converters.dcp.optimizer_state import SavedOptimizer


@dataclass(frozen=True, slots=True)
class SavedStates:
    """The states of a training in a folder of DCP: leaves of its model and of its
    optimizer, by name.

    ``entries`` are all leaves of the model's state dict, by the name of the entry and the
    keys below it. ``renamed`` has been applied to the names.
    """

    state: DcpState
    model: Mapping[str, str]
    entries: Mapping[str, Mapping[KeyPath, str]]
    optimizer: SavedOptimizer | None
    renamed: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, renamed: Mapping[str, str]) -> SavedStates:
        """``CheckpointError`` for what is damaged, or holds no model."""
        state = DcpState(folder)
        layout = layouts.split(state.leaves, folder)
        has_optimizer = bool(layout.optimizer.states or layout.optimizer.groups)
        optimizer = SavedOptimizer(state, layout.optimizer) if has_optimizer else None
        model = {new_name(name, renamed): leaf for name, leaf in layout.model.items()}
        return cls(state, model, _entries(state, layout.model, renamed), optimizer, renamed)

    @property
    def folder(self) -> Path:
        """The folder that it lies in."""
        return self.state.folder

    def stored(self, leaf: str) -> StoredTensor:
        """A tensor as it is described."""
        return self.state.description.tensors[leaf]

    def names_beside(self, names: Collection[str]) -> list[str]:
        """What the model has under other names: tensors and extra state."""
        known_leaves = {leaf for name in names for leaf in self.entries.get(name, {}).values()}
        surplus = [
            name
            for name, leaf in self.model.items()
            if name not in names and leaf not in known_leaves
        ]
        extra = (name for name in self.entries if _is_extra(name) and name not in names)
        return list(dict.fromkeys((*surplus, *extra)))

    def value(self, leaf: str) -> Any:
        """What is no tensor; a tensor as a ``StoredLeaf``."""
        if leaf in self.state.description.tensors:
            return StoredLeaf(leaf)
        return plain_values.read(f"{self.folder}: {leaf}", self.state.value(leaf))

    def nest(self, name: str, leaves_by_key: Mapping[KeyPath, str]) -> Any:
        """Leaves as they were nested under ``name``; tensors are ``StoredLeaf``."""
        values = {keys: self.value(leaf) for keys, leaf in leaves_by_key.items()}
        return nest(f"{self.folder}: {name}", values)

    def optimizer_state(self, name: str) -> Any:
        """What the optimizer keeps for a parameter; tensors are ``StoredLeaf``."""
        assert self.optimizer is not None
        leaves_by_text = self.optimizer.leaves.states.get(name, {})
        leaves_by_key = {self._keys_below(leaf, key): leaf for key, leaf in leaves_by_text.items()}
        return self.nest(f"the optimizer's state of {name}", leaves_by_key)

    def group_options(self) -> list[Mapping[str, Any]]:
        """The options of each group; a tensor of one number is that number, others
        ``StoredLeaf``."""
        assert self.optimizer is not None
        groups = self.optimizer.groups()
        leaves_by_group = self.optimizer.leaves.groups
        if not all(owner.isdecimal() for owner in leaves_by_group):
            return [
                {key: plain_values.read(key, value) for key, value in group.options.items()}
                for group in groups
            ]

        options = []
        for group, owner in zip(groups, sorted(leaves_by_group, key=int), strict=True):
            values = {
                self._keys_below(leaf, key): self._option(leaf, group.options[key])
                for key, leaf in leaves_by_group[owner].items()
                if key in group.options
            }
            options.append(nest(f"{self.folder}: param group {owner}", values))
        return options

    def _keys_below(self, leaf: str, key: str) -> KeyPath:
        return keys_below(self.state.description.keys.get(leaf, ()), key)

    def _option(self, leaf: str, value: Any) -> Any:
        is_tensor = leaf in self.state.description.tensors
        if is_tensor and not isinstance(value, (int, float)):
            return StoredLeaf(leaf)
        return plain_values.read(f"{self.folder}: {leaf}", value)


def _is_extra(name: str) -> bool:
    """Whether it is the entry of what a module's ``get_extra_state`` gives."""
    return name.rpartition(".")[2] == "_extra_state"


def _entries(
    state: DcpState, model: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, dict[KeyPath, str]]:
    """All leaves below the key of the model; where names stand at the root, of what is no
    tensor those of extra state."""
    model_leaves = {*model.values()}
    paths = {leaf.name: leaf.keys for leaf in state.leaves}
    name, first_leaf = next(iter(model.items()))
    root = paths[first_leaf][: -len(keys_below(paths[first_leaf], name))]
    objects = {leaf.name for leaf in state.leaves if not leaf.is_tensor}

    entries: dict[str, dict[KeyPath, str]] = {}
    for leaf, path in paths.items():
        below = path[len(root) :]
        if path[: len(root)] != root or not below:
            continue
        is_object = leaf in objects and (bool(root) or _is_extra(below[0]))
        if is_object or leaf in model_leaves:
            entries.setdefault(new_name(below[0], renamed), {})[below[1:]] = leaf
    return entries
