"""A training with FSDP, as ZeRO knows it: param groups, buffers, frozen parameters.

FSDP keeps the states of each parameter, ZeRO those of a group's elements, with one count
of steps for each group. What is not trained is a buffer or a frozen parameter: the files
tell them apart only where a tensor holds no floating-point numbers, or was cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters.dcp.checkpoint import ParameterGroup, ShardedCheckpoint
from converters.errors import CheckpointError
from converters.options import BUFFER
from converters.pickles.values import Call, Global
from converters.tensors import Checksum, TensorRef
from converters.torch_files import object_graph
from converters.words import some
from converters.zero.param_groups import WEIGHTS, ParamGroup

STEP = "step"
_ADAM_STATES = {"exp_avg", "exp_avg_sq"}


@dataclass(frozen=True, slots=True)
class FsdpTraining:
    """A training that saved with FSDP, for ZeRO to go on with.

    ``source`` has the buffers decided on. ``step`` is how many steps the optimizer took,
    and ``checksums`` those of all records that weights and states lie in. ``notes`` are
    what a user should know.
    """

    source: ShardedCheckpoint
    groups: tuple[ParamGroup, ...]
    step: int
    checksums: tuple[Checksum, ...]
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> frozenset[str]:
        """The parameters that have states."""
        return frozenset(name for group in self.groups for name in group.shapes)

    @property
    def frozen(self) -> list[str]:
        """The parameters that have none, in the model's order."""
        weights, trained = self.source.weights, self.trained
        return [name for name in weights.tensors if name not in trained | weights.buffers]


def of(
    source: ShardedCheckpoint,
    buffer_names: Collection[str],
    all_buffers: Collection[str] | None = None,
) -> FsdpTraining:
    """The training; ``buffer_names`` are tensors
    of which the caller knows that they are buffers.

    ``all_buffers`` are those that ``ckpt to-dcp`` wrote down, if it made the checkpoint.

    ``CheckpointError`` where there is no optimizer, its states are not for each element,
    or the parameters of a group took different numbers of steps.
    """
    if source.groups is None or not (saved_groups := source.groups()):
        raise CheckpointError(
            f"{source.place.folder} has no states of an optimizer by the names of parameters, "
            "which ZeRO goes on with; ckpt to-fp32 makes a model folder of its weights",
            "unsupported",
        )

    present_buffers = [name for name in all_buffers or () if name in source.weights.tensors]
    source = _with_buffers(source, {*buffer_names, *present_buffers})
    groups = [
        _group(source, group, index) for index, group in enumerate(saved_groups) if group.names
    ]
    training = FsdpTraining(
        source,
        tuple(groups),
        _step_of(source, saved_groups),
        checksums_of(source, saved_groups),
    )
    return replace(training, notes=tuple(_notes(training) if all_buffers is None else ()))


def checksums_of(
    source: ShardedCheckpoint, groups: Sequence[ParameterGroup]
) -> tuple[Checksum, ...]:
    """The records of weights and states, in the order of the files."""
    records = {(item.extent.path, item.extent.offset): item for item in source.weights.checksums}
    assert source.located_states is not None
    for name in (name for group in groups for name in group.names):
        for located in source.located_states(name).values():
            for item in located.checksums:
                records[item.extent.path, item.extent.offset] = item

    return tuple(records[key] for key in sorted(records))


def _with_buffers(source: ShardedCheckpoint, names: Collection[str]) -> ShardedCheckpoint:
    """The same with further tensors as buffers; ``CheckpointError`` if they are none."""
    weights = source.weights
    for name in names:
        if name not in weights.tensors or name in weights.trained:
            what = "is trained" if name in weights.trained else "is not in the checkpoint"
            raise CheckpointError(
                f"{BUFFER(name)}: {name} {what}; name a tensor that no optimizer trains", "refused"
            )

    buffers = weights.buffers | {*names}
    frozen = weights.frozen - buffers
    return replace(source, weights=replace(weights, buffers=buffers, frozen=frozen))


def _notes(training: FsdpTraining) -> Iterator[str]:
    """Which tensors were taken for frozen parameters, where nothing says so."""
    doubtful_names = [
        name for name in training.frozen if name not in training.source.weights.frozen
    ]
    if doubtful_names:
        yield (
            f"taken for frozen parameters, as the files do not tell: {some(doubtful_names)}; an "
            f"engine in which one is a buffer refuses its size: then name it with {BUFFER('NAME')}"
        )


def _group(source: ShardedCheckpoint, group: ParameterGroup, index: int) -> ParamGroup:
    assert source.located_states is not None
    tensors = source.weights.tensors
    missing_names = [name for name in group.names if name not in tensors]
    if missing_names:
        raise CheckpointError(
            f"{source.place.folder} has states of {missing_names[0]} and no weights of it",
            "incomplete",
        )

    _require_states(source, group, index)
    values: dict[str, dict[str, TensorRef]] = {
        WEIGHTS: {name: tensors[name] for name in group.names}
    }
    numbers: dict[str, dict[str, TensorRef]] = {}
    for name in group.names:
        for key, located in source.located_states(name).items():
            if (tensor := located.tensor) is None:
                raise CheckpointError(
                    f"{source.place.folder}: {key} of {name} {located.reason}", "unsupported"
                )
            is_of_elements = tensor.shape == tensors[name].shape and key != STEP
            (values if is_of_elements else numbers).setdefault(key, {})[name] = tensor

    _require_alike(source, group, index, values)
    constants = {key: _constant(source, group, index, key, numbers[key]) for key in numbers}
    return ParamGroup(
        {name: tensors[name].shape for name in group.names},
        values,
        constants,
        _options(group, values),
        (*constants, *(key for key in values if key != WEIGHTS)),
    )


def _require_states(source: ShardedCheckpoint, group: ParameterGroup, index: int) -> None:
    """``CheckpointError`` unless the optimizer keeps something
    for every parameter of a group."""
    assert source.located_states is not None
    stateless_names = [name for name in group.names if not source.located_states(name)]
    if stateless_names:
        raise CheckpointError(
            f"{source.place.folder}: the optimizer has no state of {some(stateless_names)}, of "
            f"param group {index}, expected that of a step; train a step in which all have "
            "gradients, with an optimizer that keeps states; ckpt to-fp32 makes a model folder "
            "of the weights",
            "unsupported",
        )


def _require_alike(
    source: ShardedCheckpoint,
    group: ParameterGroup,
    index: int,
    values: Mapping[str, Mapping[str, TensorRef]],
) -> None:
    """``CheckpointError`` unless all parameters of a group have the same states."""
    for key, tensors in values.items():
        lacking_names = [name for name in group.names if name not in tensors]
        if lacking_names:
            raise CheckpointError(
                f"{source.place.folder}: {some(lacking_names)} of param group {index} have no "
                f"{key}, which others of the group have; ZeRO keeps it for the whole group: train "
                "a step in which all of them have gradients",
                "unsupported",
            )


def _constant(
    source: ShardedCheckpoint,
    group: ParameterGroup,
    index: int,
    key: str,
    tensors: Mapping[str, TensorRef],
) -> Call:
    """What a group keeps once: that of its first parameter, which is that of all."""
    assert source.optimizer is not None
    first_name = group.names[0]
    expected = source.optimizer(first_name).get(key)
    for name in group.names:
        value = source.optimizer(name).get(key)
        if name not in tensors or isinstance(value, TensorRef) or value != expected:
            raise CheckpointError(
                f"{source.place.folder}: {key} of {name} is not that of {first_name}, which is in "
                f"the same param group ({index}); ZeRO keeps one for the whole group",
                "unsupported",
            )

    tensor = tensors[first_name]
    return object_graph.tensor(object_graph.storage(tensor.view(tensor.numel)), tensor.shape)


def _options(
    group: ParameterGroup, values: Mapping[str, Mapping[str, TensorRef]]
) -> dict[str, Any]:
    """The options, and the one that DeepSpeed's Adams have and torch's lack."""
    options = {key: value for key, value in group.options.items() if not _is_foreign(value)}
    if values.keys() >= _ADAM_STATES:
        options.setdefault("bias_correction", True)
    return options


def _is_foreign(value: Any) -> bool:
    """Whether an option is an object or a tensor, and no plain value."""
    return isinstance(value, (Call, Global, TensorRef))


def _step_of(source: ShardedCheckpoint, groups: Sequence[ParameterGroup]) -> int:
    """The steps that the optimizer took,
    or that the trainer counted; 0 if nothing says it."""
    assert source.optimizer is not None
    steps = [source.optimizer(group.names[0]).get(STEP) for group in groups if group.names]
    counts = [int(step) for step in steps if isinstance(step, (int, float))]
    return max(counts, default=source.step or 0)
