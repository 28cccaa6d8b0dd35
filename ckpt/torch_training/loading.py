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
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ckpt.torch_training import group_matching, leaves
from ckpt.torch_training.boxes import LocalBox, Shape, local_box
from ckpt.torch_training.model_entries import ModelEntries, Target
from ckpt.torch_training.nesting import fill_leaves
from ckpt.torch_training.saved_states import SavedStates
from ckpt.torch_training.training import TorchTraining
from converters.dcp import items
from converters.dcp.entries.description import StoredTensor
from converters.errors import CheckpointError
from converters.storage import open_files
from converters.tensors import TensorRef
from converters.words import more
from converters.words import shape as shape_text


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The targets of a load, by the leaf; groups of the optimizer as saved.

    Of ``computed``, ``optimizer_states`` (by the saved name of the parameter) and
    ``groups`` each tensor is a ``StoredLeaf``, which is read by the load.
    """

    training: TorchTraining
    targets: Mapping[str, torch.Tensor]
    computed: Mapping[str, Any] = field(default_factory=dict)  # by the key in the state dict
    names: Mapping[int, str] = field(default_factory=dict)  # of parameters as saved, by id
    groups: tuple[Mapping[str, Any], ...] = ()  # options, in the order of the optimizer's groups
    optimizer_states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def require_fit(
    states: SavedStates, training: TorchTraining, with_optimizer: bool = True, strict: bool = True
) -> LoadPlan:
    """Decides what goes where; ``CheckpointError`` unless the names, shapes and types
    are the same.

    Without ``strict`` the model may have more, and the checkpoint too.
    """
    entries = ModelEntries.of(training)
    targets: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    for target in entries.targets:
        name = next((name for name in target.names if name in states.model), None)
        if name is None:
            missing.append(target.names[0])
        else:
            leaf = states.model[name]
            _require_alike(states.folder, name, states.stored(leaf), target.value)
            targets[leaf] = target.value

    computed: dict[str, Any] = {}
    for key, value in entries.computed.items():
        name = training.name_of(key)
        if name in states.entries:
            computed[key] = states.nest(name, states.entries[name])
        elif not isinstance(value, dict) or value:  # torch does not save an empty one
            missing.append(name)

    names = {name for target in entries.targets for name in target.names}
    names |= {training.name_of(key) for key in entries.computed}
    surplus = states.names_beside(names)
    if strict and (missing or surplus):
        raise _other_names(states.folder, missing, surplus)
    plan = LoadPlan(training, targets, computed)
    if not with_optimizer or training.optimizer is None:
        return plan
    return _with_optimizer(states, plan, entries.targets)


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
            f"{folder}: {name} is {stored.dtype}, in this model {dtype}; make the model in the "
            "type that was saved",
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

    aliases = {id(target.value): target.names for target in targets}
    match = group_matching.match(states.folder, saved, training, aliases, states.renamed)
    options = states.group_options()
    groups = tuple({} if index is None else options[index] for index in match.indices)
    optimizer_states = {
        name: state for name in match.names.values() if (state := states.optimizer_state(name))
    }
    return replace(plan, names=match.names, groups=groups, optimizer_states=optimizer_states)


def load_model(states: SavedStates, plan: LoadPlan, strict: bool = True) -> None:
    """Fills the parameters and buffers with this rank's part of each, and gives modules what
    they had computed; ``strict`` as of ``load_state_dict``."""
    with torch.no_grad():
        for leaf, value in plan.targets.items():
            fill(states, leaf, local_box(leaf, value))

    if plan.computed:
        module = plan.training.module
        current = module.state_dict(keep_vars=True)
        values = {
            key: fill_leaves(value, partial(_value, states, owner=current[key]))
            for key, value in plan.computed.items()
        }
        module.load_state_dict({**current, **values}, strict=strict)


def load_optimizer(states: SavedStates, plan: LoadPlan) -> None:
    """Gives the optimizer its state, and its groups the options that were saved."""
    optimizer = plan.training.optimizer
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    parameters: list[torch.Tensor] = []
    for group, options in zip(optimizer.param_groups, plan.groups, strict=True):
        numbers = range(len(parameters), len(parameters) + len(group[leaves.PARAMS]))
        parameters += group[leaves.PARAMS]
        options = fill_leaves(options, partial(_value, states, owner=None))
        groups.append({**_options(group, options), leaves.PARAMS: [*numbers]})

    for number, parameter in enumerate(parameters):
        values = plan.optimizer_states.get(plan.names[id(parameter)])
        if values:
            state[number] = fill_leaves(values, partial(_value, states, owner=parameter))

    optimizer.load_state_dict({leaves.STATE: state, leaves.GROUPS: groups})
    for number, values in state.items():
        parameter = parameters[number]
        optimizer.state[parameter] = _as_saved(values, optimizer.state[parameter])


def _options(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group as they were saved;
    what only this optimizer has as it is here."""
    options = {key: value for key, value in group.items() if key != leaves.PARAMS}
    for key, value in saved.items():
        current = options.get(key)
        if isinstance(current, torch.Tensor) and isinstance(value, (int, float)):
            value = torch.full_like(current, value)
        if key != "param_names" or key not in options:  # they stand in the order of here
            options[key] = value
    return options


def _as_saved(value: Any, current: Any) -> Any:
    """A state as it was saved, of what ``Optimizer.load_state_dict`` made of it: that rounds
    tensors to the type of their parameter, and makes other texts of texts."""
    if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor):
        return current if current.dtype == value.dtype else value.to(current.device)
    if isinstance(value, dict) and isinstance(current, dict):
        return {key: _as_saved(value.get(key, entry), entry) for key, entry in current.items()}
    if isinstance(value, list) and isinstance(current, list) and len(value) == len(current):
        return [_as_saved(*pair) for pair in zip(value, current, strict=True)]
    return value if type(value) is type(current) else current


def _value(states: SavedStates, leaf: str, owner: Any) -> torch.Tensor:
    """A tensor, this rank's part of it where ``owner`` of the same shape is sharded: the
    parameter that the optimizer keeps it for, or what is in its place now."""
    stored = states.stored(leaf)
    dtype = getattr(torch, stored.dtype)
    if isinstance(owner, torch.Tensor) and stored.shape == tuple(owner.shape) and stored.shape:
        value = torch.empty_like(owner.detach(), dtype=dtype)
    elif stored.shape and hasattr(owner, "placements"):
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
