"""The vectors that all ranks have of a param group: weights, and what an optimizer keeps
for each element.

From the optimizer files of stages 1 and 2 (``RankFiles``) or 3 (``SubGroupFiles``), in
rank order, ready to be joined and cut into parameters (``partitioning``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.tensors import TensorRef
from converters.zero import muon, partitioning, stage3
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files, typed
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section

WEIGHTS = ""  # the name that the master weights have among the states
_REMEDY = (
    "it cannot be cut up for other ranks; start a new optimizer from the weights of ckpt to-fp32"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """The vectors in the optimizer files of stages 1 and 2, by rank and group.

    ``paddings`` are the elements left empty behind each parameter, by group.
    """

    checkpoint: Checkpoint
    paddings: list[list[int]]
    states: list[list[dict[str, Any]]]
    masters: list[list[TensorRef]]
    end_paddings: list[list[int]]

    @staticmethod
    def of(checkpoint: Checkpoint, group_count: int) -> RankFiles:
        """The vectors of stages 1 and 2, of every rank and group."""
        ranks = checkpoint.ranks
        states = [states_and_options(state.optimizer_fields)[0] for state in ranks]
        for state, group_states in zip(ranks, states, strict=True):
            if len(group_states) != group_count:
                raise state.fail(
                    f"its optimizer has the state of {len(group_states)} groups, "
                    f"expected {group_count}"
                )

        return RankFiles(
            checkpoint=checkpoint,
            paddings=state_files.alignment_paddings(ranks[0], group_count),
            states=states,
            masters=[_master_partitions(state, group_count) for state in ranks],
            end_paddings=[_end_paddings(state, group_count) for state in ranks],
        )

    def vectors(
        self, index: int, shapes: Mapping[str, Shape], options: Mapping[str, Any] | None
    ) -> dict[str, list[TensorRef]]:
        """The weights of a group and each state of its elements:
        the vectors of all ranks."""
        masters, padded_sizes = self._partitions(index, shapes)
        states = [by_group[index] for by_group in self.states]
        label = f"group {index}"
        momenta: Sequence[TensorRef] = ()

        # BF16_Optimizer keeps Muon's momentum for the elements of a rank
        model, bf16_optimizer = self.checkpoint.model, self.checkpoint.bf16_optimizer
        whole_momentum = muon.keeps_whole_momentum(model) and not bf16_optimizer
        if whole_momentum and muon.is_muon_group(options):
            ranks, paddings = self.checkpoint.ranks, self.paddings[index]
            momenta = muon.own_momenta(ranks, label, masters, states, shapes, paddings, _REMEDY)
            states = [
                {key: value for key, value in state.items() if key != muon.MOMENTUM}
                for state in states
            ]

        vectors = _state_vectors(self.checkpoint, label, masters, padded_sizes, states)
        if momenta:
            vectors[muon.MOMENTUM] = list(momenta)
        return vectors

    def _partitions(
        self, index: int, shapes: Mapping[str, Shape]
    ) -> tuple[list[TensorRef], list[int]]:
        """The ranks' master weights of a group, and the lengths of them with padding."""
        masters = [partitions[index] for partitions in self.masters]
        if self.checkpoint.bf16_optimizer:  # the weights are kept with the padding
            numel = sum(prod(shape) for shape in shapes.values())
            return _unpadded(masters, numel), [master.numel for master in masters]

        by_rank = zip(masters, self.end_paddings, strict=True)
        return masters, [master.numel + paddings[index] for master, paddings in by_rank]


def _master_partitions(state: State, group_count: int) -> list[TensorRef]:
    key = "single_partition_of_fp32_groups"
    partitions = state_files.tensors(state, state.optimizer_fields.required(key, list), key)
    if len(partitions) != group_count:
        raise state.fail(f"{key} has {len(partitions)} groups, expected {group_count}")
    return partitions


def _end_paddings(state: State, group_count: int) -> list[int]:
    """The padding behind each group in a rank's partition."""
    if not state.optimizer.get("group_paddings"):
        return [0] * group_count

    paddings = state.optimizer_fields.numbers("group_paddings")
    if len(paddings) != group_count or min(paddings, default=0) < 0:
        raise state.fail(
            f"group_paddings is {state_files.shown(paddings)}, expected the elements "
            f"behind each of {group_count} groups"
        )
    return paddings


def _unpadded(masters: Sequence[TensorRef], numel: int) -> list[TensorRef]:
    """The partitions of a group of ``numel`` elements without the padding at its end."""
    partitions, remaining = [], numel
    for master in masters:
        partitions.append(master.narrow(0, min(remaining, master.numel)))
        remaining -= partitions[-1].numel
    return partitions


@dataclass(frozen=True, slots=True)
class SubGroupFiles:
    """The vectors in the optimizer files of stage 3,
    by rank: states and flat weights."""

    checkpoint: Checkpoint
    states: list[Section]
    flats: list[list[TensorRef]]

    @staticmethod
    def of(checkpoint: Checkpoint) -> SubGroupFiles:
        """The vectors of stage 3, of every rank and sub-group."""
        ranks = checkpoint.ranks
        inner = [state.optimizer_fields.section("optimizer_state_dict") for state in ranks]
        key = "fp32_flat_groups"
        flats = [state_files.tensors(state, state.optimizer.get(key), key) for state in ranks]
        return SubGroupFiles(checkpoint, [fields.section("state") for fields in inner], flats)

    def vectors(
        self, index: int, first_index: int, shapes: Mapping[str, Shape]
    ) -> dict[str, list[TensorRef]]:
        """The weights of a sub-group and each state of its elements:
        the vectors of all ranks.

        ``first_index`` is the first sub-group of the param group, which has the same
        constants.
        """
        ranks = self.checkpoint.ranks
        length = partitioning.subgroup_size(shapes, len(ranks))
        masters, states = [], []
        by_rank = zip(ranks, self.flats, self.states, strict=True)
        for rank, (state, flat_groups, states_by_index) in enumerate(by_rank):
            location = (self.checkpoint.place.folder, state, rank, index, flat_groups[index])
            masters.append(stage3.vector(*location, length))
            states.append(stage3.kept(*location, states_by_index.state(index), length))

        lengths = [length] * len(ranks)
        label = f"sub-group {index}"
        vectors = _state_vectors(self.checkpoint, label, masters, lengths, states)
        if not _same_constants(self.states[0].state(first_index), states[0], vectors):
            raise CheckpointError(
                f"{ranks[0].path}: sub-group {index} has other state, or another "
                f"step, than sub-group {first_index} of the same param group; it "
                "cannot be cut up for other ranks",
                "unsupported",
            )
        return vectors


def _same_constants(
    first_state: Mapping[str, Any], state: Mapping[str, Any], vectors: Mapping[str, Any]
) -> bool:
    """Whether two sub-groups have the same states, and the same numbers in them."""
    return first_state.keys() == state.keys() and all(
        _constant_text(first_state[key]) == _constant_text(state[key])
        for key in first_state
        if key not in vectors
    )


def _constant_text(value: Any) -> str:
    """What is kept once, to be compared with what another rank or sub-group keeps."""
    return typed.text(state_files.scalar(value))


def states_and_options(
    optimizer: Section,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The state of each group, and the param groups.

    The first is a list (elastic, without param groups), or a dict with both.
    """
    key = "base_optimizer_state"
    if isinstance(optimizer.values.get(key), list):
        return optimizer.dicts(key), None

    base_state = optimizer.section(key)
    group_options = base_state.dicts("param_groups")
    states_by_id = base_state.section("state")
    states: list[dict[str, Any]] = []

    for group in group_options:
        ids = Section(optimizer.path, "param_groups", group).numbers("params")
        if len(ids) != 1:
            raise MalformedError("a param group has not one flat parameter")
        states.append(states_by_id.state(ids[0]))

    return states, group_options


def _state_vectors(
    checkpoint: Checkpoint,
    group_label: str,
    masters: Sequence[TensorRef],
    padded_sizes: Sequence[int],
    states: Sequence[Mapping[str, Any]],
) -> dict[str, list[TensorRef]]:
    """The weights and each per-element state of a group: the vectors of all ranks.

    ``padded_sizes`` are the lengths of the ranks' vectors with the padding that
    the state has, and the weights have not. What is left out is the same on every
    rank: a constant.
    """
    vectors: dict[str, list[TensorRef]] = {WEIGHTS: list(masters)}
    _require_same_keys(checkpoint, group_label, states)
    for key in states[0]:
        values = [state[key] for state in states]
        label = f"{key} of {group_label}"
        if any(isinstance(value, dict) for value in values):
            raise CheckpointError(
                f"{checkpoint.place.folder}: the optimizer keeps {label}, codes with a "
                "scale for each block of elements (8-bit): " + _REMEDY,
                "unsupported",
            )

        if _is_constant(checkpoint, label, values, padded_sizes):
            continue

        vectors[key] = [
            _state_vector(state.path, label, value, master, length)
            for state, value, master, length in zip(
                checkpoint.ranks, values, masters, padded_sizes, strict=True
            )
        ]

    return vectors


def _require_same_keys(
    checkpoint: Checkpoint, group_label: str, states: Sequence[Mapping[str, Any]]
) -> None:
    if any(state.keys() != states[0].keys() for state in states):
        raise CheckpointError(
            f"{checkpoint.place.folder}: the ranks keep unlike optimizer state of "
            f"{group_label}; files are of different saves"
        )


def _is_constant(
    checkpoint: Checkpoint, label: str, values: Sequence[Any], padded_sizes: Sequence[int]
) -> bool:
    """Whether the ranks' values are one that is kept once;
    raises if they are not the same."""
    by_rank = zip(values, padded_sizes, strict=True)
    if any(_per_element(value, length) for value, length in by_rank):
        return False

    if len({_constant_text(value) for value in values}) != 1:
        raise CheckpointError(
            f"{checkpoint.place.folder}: the ranks have unlike {label}; files are of "
            "different saves"
        )
    return True


def _state_vector(
    path: Path, label: str, value: Any, master: TensorRef, padded_size: int
) -> TensorRef:
    """A rank's state for the elements of its master weights."""
    numel = value.numel if isinstance(value, TensorRef) else 0
    if not isinstance(value, TensorRef) or numel not in (master.numel, padded_size):
        raise CheckpointError(
            f"{path}: the optimizer's {label} has {numel} elements, its weights "
            f"{master.numel}: it is not kept for each element, so " + _REMEDY,
            "unsupported",
        )
    return value.narrow(0, master.numel)


def _per_element(value: Any, length: int) -> bool:
    """Whether a value belongs to elements: a tensor, but no number.

    A number is 0-dim, or alone in its tensor.
    """
    if not isinstance(value, TensorRef):
        return False
    return bool(value.shape) and (value.numel != 1 or length == 1)
