"""A distributed checkpoint into a training of plain torch:
each rank reads the bytes of its part.

    states = SavedStates.read(folder)        what is there; nothing of a tensor is read
    plan = require_fit(states, training)      names, shapes and types, before anything is touched
    load_model(states, plan)
    load_optimizer(states, plan)

Whoever saved it, and on however many ranks: a tensor is boxes in files, and this rank
has a box of it. What is read goes straight into the training's own memory where that is
in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckpt.engine.parameters import new_name
from ckpt.torch_training import leaves
from ckpt.torch_training.boxes import LocalBox, Shape, local_box
from ckpt.torch_training.training import TorchTraining
from converters.dcp import items
from converters.dcp.dcp_state import DcpState
from converters.dcp.entries.description import StoredTensor
from converters.dcp.keys import layouts
from converters.dcp.optimizer_state import SavedOptimizer
from converters.errors import CheckpointError
from converters.storage import open_files
from converters.tensors import TensorRef
from converters.words import more
from converters.words import shape as shape_text


@dataclass(frozen=True, slots=True)
class SavedStates:
    """The states of a training in a folder of DCP: leaves of its model and of its
    optimizer, by name.

    ``renamed`` has been applied to the names.
    """

    state: DcpState
    model: Mapping[str, str]
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
        return cls(state, model, optimizer, renamed)

    @property
    def folder(self) -> Path:
        """The folder that it lies in."""
        return self.state.folder

    def stored(self, leaf: str) -> StoredTensor:
        """A tensor as it is described."""
        return self.state.description.tensors[leaf]


class Target(NamedTuple):
    """A tensor of the model, and all its names there."""

    value: torch.Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The targets of a load, by the leaf; groups of the optimizer as saved."""

    training: TorchTraining
    targets: Mapping[str, torch.Tensor]
    names: Mapping[int, str] = field(default_factory=dict)  # of parameters as saved, by id
    groups: tuple[Mapping[str, Any], ...] = ()  # options, in the order of the optimizer's groups


def require_fit(
    states: SavedStates, training: TorchTraining, with_optimizer: bool = True, strict: bool = True
) -> LoadPlan:
    """Decides what goes where; ``CheckpointError`` unless the names, shapes and types
    are the same.

    Without ``strict`` the model may have more, and the checkpoint too.
    """
    targets_by_name = _targets(training)
    targets: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    for target in targets_by_name:
        name = next((name for name in target.names if name in states.model), None)
        if name is None:
            missing.append(target.names[0])
        else:
            leaf = states.model[name]
            _require_alike(states.folder, name, states.stored(leaf), target.value)
            targets[leaf] = target.value

    known_names = {name for target in targets_by_name for name in target.names}
    surplus = [name for name in states.model if name not in known_names]
    if strict and (missing or surplus):
        raise _other_names(states.folder, missing, surplus)
    if not with_optimizer or training.optimizer is None:
        return LoadPlan(training, targets)
    return _with_optimizer(states, LoadPlan(training, targets), targets_by_name)


def _targets(training: TorchTraining) -> list[Target]:
    names: dict[int, list[str]] = {}
    values: dict[int, torch.Tensor] = {}
    for leaf in leaves.of_model(training):
        if leaf.is_tensor:
            names.setdefault(id(leaf.value), []).append(str(leaf.path[1]))
            values[id(leaf.value)] = leaf.value
    return [Target(values[key], tuple(names[key])) for key in names]


def _other_names(folder: Path, missing: list[str], surplus: list[str]) -> CheckpointError:
    parts = []
    if missing:
        parts.append(f"it lacks {missing[0]}{more(len(missing) - 1)} of this model")
    if surplus:
        parts.append(f"it has {surplus[0]}{more(len(surplus) - 1)}, which this model has not")
    return CheckpointError(
        f"{folder} is of another model: {' and '.join(parts)}; give the model that was saved or, "
        "if only names are new, say renamed={saved: new}",
        "refused",
    )


def _require_alike(folder: Path, name: str, stored: StoredTensor, value: torch.Tensor) -> None:
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if stored.shape != shape:
        raise CheckpointError(
            f"{folder}: {name} is {shape_text(stored.shape)}, in this model {shape_text(shape)}; "
            "give the model that was saved",
            "refused",
        )
    if stored.dtype != dtype:
        raise CheckpointError(
            f"{folder}: {name} is {stored.dtype}, in this model {dtype}, which would round it; "
            "make the model in the type that was saved",
            "refused",
        )


def _with_optimizer(states: SavedStates, plan: LoadPlan, targets: Iterable[Target]) -> LoadPlan:
    """The same with the optimizer's groups; ``CheckpointError`` where they are others."""
    training, saved = plan.training, states.optimizer
    if saved is None or not saved.leaves.are_named:
        raise CheckpointError(
            f"{states.folder} has no state of an optimizer by the names of parameters; "
            "load_optimizer_states=False takes the weights, and begins with a new optimizer",
            "incomplete",
        )

    saved_groups = saved.groups()
    group_of = {
        new_name(name, states.renamed): (index, name)
        for index, group in enumerate(saved_groups)
        for name in group.names
    }
    aliases = {id(target.value): target.names for target in targets}
    names: dict[int, str] = {}
    options = []
    for number, group in enumerate(training.optimizer.param_groups):
        indices = set()
        for value in group[leaves.PARAMS]:
            matches = [group_of[name] for name in aliases[id(value)] if name in group_of]
            if not matches:
                raise _other_groups(states.folder, number, aliases[id(value)][0])
            indices.add(matches[0][0])
            names[id(value)] = matches[0][1]
        if len(indices) > 1:
            raise _other_groups(states.folder, number, aliases[id(group[leaves.PARAMS][0])][0])
        options.append(saved_groups[indices.pop()].options if indices else {})

    lost = [name for name, (_, saved_name) in group_of.items() if saved_name not in names.values()]
    if lost:
        raise _other_groups(states.folder, None, lost[0])
    return LoadPlan(training, plan.targets, names, tuple(options))


def _other_groups(folder: Path, number: int | None, name: str) -> CheckpointError:
    place = "no param group" if number is None else f"param group {number}"
    return CheckpointError(
        f"{folder}: {name} is in {place} of this optimizer, and was saved in another; give the "
        "optimizer the same groups, or load_optimizer_states=False to begin with a new one",
        "refused",
    )


def load_model(states: SavedStates, plan: LoadPlan) -> None:
    """Fills the parameters and buffers with this rank's part of each."""
    with torch.no_grad():
        for leaf, value in plan.targets.items():
            fill(states, leaf, local_box(leaf, value))


def load_optimizer(states: SavedStates, plan: LoadPlan) -> None:
    """Gives the optimizer its state, and its groups the options that were saved."""
    optimizer, saved = plan.training.optimizer, states.optimizer
    assert saved is not None
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    parameters: list[torch.Tensor] = []
    for group, options in zip(optimizer.param_groups, plan.groups, strict=True):
        numbers = range(len(parameters), len(parameters) + len(group[leaves.PARAMS]))
        parameters += group[leaves.PARAMS]
        groups.append({**_options(group, options), leaves.PARAMS: [*numbers]})

    for number, parameter in enumerate(parameters):
        values = saved.leaves.states.get(plan.names[id(parameter)], {})
        if values:
            state[number] = {key: _value(states, leaf, parameter) for key, leaf in values.items()}

    optimizer.load_state_dict({leaves.STATE: state, leaves.GROUPS: groups})
    for number, values in state.items():  # torch rounds states to the type of their parameter
        torch_state = optimizer.state[parameters[number]]
        for key, value in values.items():
            current = torch_state.get(key)
            if not isinstance(value, torch.Tensor) or not isinstance(current, torch.Tensor):
                continue
            if current.dtype != value.dtype:
                torch_state[key] = value.to(current.device)


def _options(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group as they were saved;
    what only this optimizer has as it is here."""
    options = {key: value for key, value in group.items() if key != leaves.PARAMS}
    for key, value in saved.items():
        current = options.get(key)
        if isinstance(current, torch.Tensor) and isinstance(value, (int, float)):
            value = torch.full_like(current, value)
        if _is_plain(value) or isinstance(value, torch.Tensor):
            options[key] = value
    return options


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, bytes, type(None)))


def _value(states: SavedStates, leaf: str, parameter: torch.Tensor) -> Any:
    """The state that the optimizer keeps for a parameter, this rank's part of it."""
    if leaf not in states.state.description.tensors:
        return states.state.value(leaf)

    stored = states.stored(leaf)
    dtype = getattr(torch, stored.dtype)
    if stored.shape == tuple(parameter.shape) and stored.shape:
        value = torch.empty_like(parameter.detach(), dtype=dtype)
    elif stored.shape and hasattr(parameter, "placements"):
        raise CheckpointError(
            f"{states.folder}: {leaf} has another shape than its parameter, and nothing says how "
            "it is sharded here; load it with dcp.load, or load_optimizer_states=False",
            "unsupported",
        )
    else:
        value = torch.empty(stored.shape, dtype=dtype)
    fill(states, leaf, local_box(leaf, value))
    return value


def fill(states: SavedStates, leaf: str, box: LocalBox) -> None:
    """Reads a box of a tensor into its values;
    ``CheckpointError`` if the chunks lack a part."""
    stored = states.stored(leaf)
    filled = 0
    for chunk in stored.chunks:
        common = _intersection(chunk.offsets, chunk.sizes, box.offsets, box.sizes)
        if common is None:
            continue
        offsets, sizes = common
        item = items.located(states.state.reader, leaf, stored.dtype, chunk)
        if item.tensor is None:
            raise CheckpointError(f"{states.folder}: {leaf} is not read: {item.reason}")

        origin = [low - start for low, start in zip(offsets, chunk.offsets, strict=True)]
        part = item.tensor.box(origin, sizes)
        target = box.values
        for axis, (low, start) in enumerate(zip(offsets, box.offsets, strict=True)):
            target = target.narrow(axis, low - start, sizes[axis])
        _read(part, target)
        filled += prod(sizes)

    if filled != prod(box.sizes):
        raise CheckpointError(
            f"{states.folder} has {filled:,} of {prod(box.sizes):,} elements of {leaf} that this "
            "rank needs; files are missing, or the save did not finish",
            "incomplete",
        )


def _intersection(
    first: Shape, first_sizes: Shape, second: Shape, second_sizes: Shape
) -> tuple[Shape, Shape] | None:
    """Where two boxes meet: offsets and sizes; ``None`` where they do not."""
    axes = list(zip(first, first_sizes, second, second_sizes, strict=True))
    lows = tuple(max(a, b) for a, _, b, _ in axes)
    ends = tuple(min(a + n, b + m) for a, n, b, m in axes)
    sizes = tuple(end - low for low, end in zip(lows, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else (lows, sizes)


def _read(part: TensorRef, target: torch.Tensor) -> None:
    """Reads the elements of ``part`` into ``target``, wherever that is."""
    target = target.detach()
    if target.device.type == "cpu" and target.is_contiguous():
        open_files.read_extents(_memory(target), part.extents)
        return
    buffer = torch.empty(tuple(target.shape), dtype=target.dtype)
    open_files.read_extents(_memory(buffer), part.extents)
    target.copy_(buffer)


def _memory(tensor: torch.Tensor) -> memoryview:
    octets: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(octets)
