"""The state that crosses from one format to another: weights, optimizer states and
options, by name.

Names are those that torch's FSDP has for parameters (``_get_fqns`` of torch 2.13
``torch/distributed/checkpoint/state_dict.py``), which leaves out what wrappers put in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from converters.dcp.checkpoint import ParameterGroup, ShardedCheckpoint
from converters.dcp.writing import torch_options, without_zero
from converters.dcp.writing.items import Number, PlainObject, Value
from converters.errors import CheckpointError
from converters.names.rules import UNMISTAKABLE
from converters.pickles.values import Call
from converters.source import Source
from converters.tensors import TensorRef, Weights
from converters.torch_files.object_graph import Storage
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.merging import checkpoint as merged
from converters.zero.param_groups import WEIGHTS, ParamGroup
from converters.zero.universal.parameter_folders import number
from converters.zero.universal.reader import Universal

STEP = "step"
_DATA_PARALLEL = "module."
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class OptimizerGroup:
    """A param group: its parameters in order, the state of each by key, and options.

    A state that the optimizer keeps once for the group is that of each of its
    parameters.
    """

    names: tuple[str, ...]
    states: Mapping[str, Mapping[str, Value]]  # by parameter, then by key
    options: Mapping[str, PlainObject]


@dataclass(frozen=True, slots=True)
class CrossingState:
    """Weights by name, in the model's order, tied names too, and the optimizer's groups.

    ``omissions`` are lines on what does not cross.
    """

    weights: Mapping[str, TensorRef]
    groups: tuple[OptimizerGroup, ...] = ()
    omissions: tuple[str, ...] = ()


def of_zero(source: Checkpoint | Universal) -> CrossingState:
    """The state of a checkpoint of ZeRO, with its optimizer; reads pickles only.

    ``CheckpointError`` if the optimizer keeps what is neither per element nor a
    constant.
    """
    if isinstance(source, Universal):
        return _with_groups(source.checkpoint, source.groups)
    groups = merged.groups_of(source) if source.ranks else without_zero.groups(source)
    return _with_groups(source, groups)


def of_weights(source: Source) -> CrossingState:
    """The weights of what has no optimizer state that can be written, or none at all."""
    state = CrossingState(_by_name(source.weights), omissions=tuple(_absences(source.weights)))
    return _without_data_parallel(state)


def of_dcp(source: ShardedCheckpoint) -> CrossingState:
    """The state of a checkpoint of FSDP or DCP, to be written in another layout.

    ``CheckpointError`` if a state of the optimizer is damaged.
    """
    weights = _by_name(source.weights)
    saved_groups = source.groups() if source.groups is not None else ()
    groups = [_saved_group(source, group, index) for index, group in enumerate(saved_groups)]
    omissions = [line for _, lines in groups for line in lines]
    state = CrossingState(
        weights,
        tuple(group for group, _ in groups),
        (*_absences(source.weights), *omissions),
    )
    return _without_data_parallel(state)


def _without_data_parallel(state: CrossingState) -> CrossingState:
    """The same without the ``module.``
    that DistributedDataParallel puts before every name.

    As ``ckpt to-fp32`` does: torch's functions for state dicts leave it out, too.
    """
    if not state.weights or not all(name.startswith(_DATA_PARALLEL) for name in state.weights):
        return state

    groups = tuple(
        OptimizerGroup(
            tuple(map(_bare_name, group.names)),
            {_bare_name(name): values for name, values in group.states.items()},
            group.options,
        )
        for group in state.groups
    )
    weights = {_bare_name(name): tensor for name, tensor in state.weights.items()}
    note = f"the names are without {_DATA_PARALLEL}, which DistributedDataParallel put before all"
    return CrossingState(weights, groups, (*state.omissions, note))


def _bare_name(name: str) -> str:
    return name.removeprefix(_DATA_PARALLEL)


def _saved_group(
    source: ShardedCheckpoint, group: ParameterGroup, index: int
) -> tuple[OptimizerGroup, tuple[str, ...]]:
    """A group as it was saved, and lines on what of it does not cross."""
    assert source.optimizer is not None
    states: dict[str, dict[str, Value]] = {}
    for name in group.names:
        # a parameter without a gradient so far is of a group, and has no state
        saved_state = source.optimizer(name) if _has_state(source, name) else {}
        states[canonical(name)] = {
            key: _saved_value(key, value) for key, value in saved_state.items()
        }

    options = torch_options.plain(group.options, index)
    names = tuple(map(canonical, group.names))
    return OptimizerGroup(names, states, options.values), options.omissions


def _has_state(source: ShardedCheckpoint, name: str) -> bool:
    """Whether the optimizer keeps anything for a parameter; a tied one has its owner's."""
    assert source.located_states is not None
    return bool(source.located_states(source.weights.aliases.get(name, name)))


def _saved_value(key: str, value: TensorRef | int | float) -> Value:
    if isinstance(value, TensorRef):
        return value
    return Number(float(value)) if key == STEP else PlainObject(value)


def _with_groups(checkpoint: Checkpoint, groups: Sequence[ParamGroup]) -> CrossingState:
    weights = _by_name(checkpoint.weights)
    omissions = [*_absences(checkpoint.weights)]
    for group in groups:
        for name, tensor in group.values[WEIGHTS].items():
            # one object for a tensor and its tied names, so that its bytes are written
            # once
            if weights[canonical(name)] != tensor:
                raise AssertionError(f"{name} is not where the optimizer's files have it")

    optimizer_groups = []
    for index, group in enumerate(groups):
        options = torch_options.of_group(checkpoint, group, index)
        omissions += options.omissions
        names = tuple(map(canonical, group.shapes))
        states = {canonical(name): dict(_states(group, name)) for name in group.shapes}
        optimizer_groups.append(OptimizerGroup(names, states, options.values))

    return CrossingState(weights, tuple(optimizer_groups), tuple(dict.fromkeys(omissions)))


def _by_name(weights: Weights) -> dict[str, TensorRef]:
    """Every tensor by its canonical name, tied ones too, in the model's order."""
    tensors = weights.by_every_name()
    order = dict.fromkeys((*(name for name in weights.order if name in tensors), *tensors))
    return renamed((name, tensors[name]) for name in order)


def _absences(weights: Weights) -> Iterator[str]:
    """A line on the names that a loader asks for and does not get."""
    if weights.absent:
        names = ", ".join(list(weights.absent)[:3])
        more = ", ..." if len(weights.absent) > 3 else ""
        yield (
            f"no file holds {names}{more}: dcp.load refuses to load a model that has them, but "
            "with DefaultLoadPlanner(allow_partial_load=True)"
        )


def _states(group: ParamGroup, name: str) -> Iterator[tuple[str, Value]]:
    """What the optimizer keeps for a parameter, ``step`` as torch's optimizers have it."""
    for key in group.keys:
        if key in group.values:
            yield key, group.values[key][name]
        elif key != STEP:
            yield key, _constant(group.constants[key])

    # FusedAdam of DeepSpeed before 0.10 counts in the options
    counted_steps = group.constants.get(STEP, (group.options or {}).get(STEP))
    steps = number(counted_steps)
    if isinstance(steps, (int, float)):
        yield STEP, Number(float(steps))


def _constant(node: Any) -> Value:
    """What is kept once for a group: a tensor where it lies, or a number."""
    if isinstance(node, Call) and node.args and isinstance(node.args[0], Storage):
        storage: Storage = node.args[0]
        offset, shape = node.args[1:3]
        return storage.ref.narrow(offset, prod(shape)).view(*shape)
    if not torch_options.is_plain(node):
        raise CheckpointError(
            f"the optimizer keeps {state_files.shown(node)} for a param group, which is neither a "
            "tensor nor a number",
            "unsupported",
        )
    return PlainObject(node)


def canonical(name: str) -> str:
    """A parameter's name without what wrappers put in (``_orig_mod``, ...)."""
    parts = [part for part in name.split(".") if part not in UNMISTAKABLE]
    return ".".join(parts)


def renamed(pairs: Iterable[tuple[str, _Entry]]) -> dict[str, _Entry]:
    """Values by canonical names; ``CheckpointError`` where two names become one."""
    values: dict[str, _Entry] = {}
    for name, value in pairs:
        if canonical(name) in values:
            raise CheckpointError(
                f"two tensors would be called {canonical(name)}, as FSDP names parameters; "
                "rename one in the model",
                "unsupported",
            )
        values[canonical(name)] = value
    return values
