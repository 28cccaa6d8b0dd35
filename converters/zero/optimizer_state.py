"""Optimizer state by the name of its parameter.

What an optimizer keeps for each element lies in its files exactly as the master weights
do. So the state of a parameter is found from its weights alone: each run of its bytes
lies in some partition of master weights, and the same elements of that partition's
state are what is wanted. The names of the state (``exp_avg``, ``momentum_buffer``, ...)
come from the data.

The 8-bit optimizers of bitsandbytes keep codes for each element (``state1``), a table
of what codes mean (``qmap1``), and a scale for each block of the rank's vector
(``absmax1``; ``blocks`` of 256 elements, counted from the vector's beginning). Source:
``optim/optimizer.py`` of bitsandbytes 0.50.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any

from converters.errors import CheckpointError, MalformedError, consistent
from converters.storage import stores
from converters.tensors import Extent, Listed, TensorRef, Weights
from converters.zero import muon, partitioning
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files, typed
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section

Value = TensorRef | int | float
QUANTIZED = "__bnb_optimizer_quant_state__"  # the key of what belongs to 8-bit states
CODES, SCALES = "state1", "absmax"
BLOCKS = (256, 2048)  # elements of a block, in bitsandbytes since 0.45 and before
# where master weights lie, their itemsize, and the state of their elements
Partition = tuple[Extent, int, Mapping[str, Any]]


def read(checkpoint: Checkpoint, name: str) -> dict[str, Value]:
    """The optimizer state of a parameter: tensors of its shape, and numbers (``step``).

    Empty where the optimizer keeps nothing for each element (SGD without momentum).
    What it keeps for blocks of elements comes as a vector, with the blocks that the
    parameter has elements in, in the order of the ranks; other tensors, such as tables
    of codes, as they are. ``KeyError`` if the name is not trained; ``CheckpointError``
    if the state has no names (fp32 runs without ZeRO).
    """
    return state_of(checkpoint.place.folder, checkpoint.weights, _partitions(checkpoint), name)


def state_of(
    folder: Path, weights: Weights, partitions: Iterable[Partition], name: str
) -> dict[str, Value]:
    """The same of any weights that lie in the partitions, however these were split up.

    ``folder`` is what messages begin with. ``KeyError`` if the name is not trained.
    """
    weight = weights.tensors[weights.aliases.get(name, name)]
    with consistent(folder, "a file is damaged or of another save"):
        return _joined_state(name, weight, partitions)


def of_flat_groups(state: State) -> Iterator[Partition]:
    """The master weights in an optimizer file of stages 1 and 2, with the state of each.

    Not for Muon, which keeps a momentum that is not the rank's own alone.
    """
    key = "single_partition_of_fp32_groups"
    masters = state_files.tensors(state, state.optimizer.get(key), key)
    inner_state = state.optimizer.get("base_optimizer_state")
    yield from _with_states(masters, _in_group_order(state.path, inner_state))


def _joined_state(
    name: str, weight: TensorRef, all_partitions: Iterable[Partition]
) -> dict[str, Value]:
    """What partitions keep for the elements of a parameter."""
    partitions_by_path: dict[Any, list[Partition]] = {}
    for partition in sorted(all_partitions, key=_offset):
        partitions_by_path.setdefault(partition[0].path, []).append(partition)

    pieces = _Pieces()
    for extent in weight.extents:
        partitions = partitions_by_path.get(extent.path, [])
        index = bisect_right(partitions, extent.offset, key=_offset) - 1
        if index < 0 or partitions[index][0].end < extent.end:
            raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")

        master_extent, itemsize, state = partitions[index]
        start = (extent.offset - master_extent.offset) // itemsize
        pieces.add(state, start, extent.length // itemsize)

    return pieces.joined(weight)


@dataclass(slots=True)
class _Pieces:
    """The state of a parameter, piece by piece as its partitions have it.

    ``by_element`` and ``by_block`` are the pieces of vectors, ``unsliced`` is what is
    kept as it is.
    """

    by_element: dict[str, list[TensorRef]] = field(default_factory=dict)
    by_block: dict[str, list[TensorRef]] = field(default_factory=dict)
    unsliced: dict[str, Value] = field(default_factory=dict)

    def add(self, state: Mapping[str, Any], start: int, count: int) -> None:
        """Adds what a partition's state has for ``count`` elements from ``start`` on."""
        values = _flattened(state)
        if not all(isinstance(key, str) for key in values):
            raise MalformedError("the optimizer keeps state under what is not a name")

        codes = values.get(CODES)
        code_count = codes.numel if isinstance(codes, TensorRef) else None

        for key, value in values.items():
            if not isinstance(value, TensorRef) or not value.shape:
                if isinstance(number := state_files.scalar(value), (int, float)):
                    self.unsliced.setdefault(key, number)
            elif _per_element(key, value, start + count, code_count):
                self.by_element.setdefault(key, []).append(value.narrow(start, count))
            elif block_size := _block_size(key, value, code_count):
                first_block = start // block_size
                block_count = -(-(start + count) // block_size) - first_block
                if first_block + block_count > value.numel:
                    raise MalformedError(
                        f"{key} has {value.numel} entries, too few for its weights"
                    )

                blocks = value.narrow(first_block, block_count)
                self.by_block.setdefault(key, []).append(blocks)
            else:
                self.unsliced.setdefault(key, value)

    def joined(self, weight: TensorRef) -> dict[str, Value]:
        """All of it; what is kept for each element has the shape of the weights."""
        vectors = {key: partitioning.joined(pieces) for key, pieces in self.by_element.items()}
        shaped_states = {
            key: vector.view(*weight.shape)
            for key, vector in vectors.items()
            if vector.numel == weight.numel
        }
        block_states = {key: partitioning.joined(pieces) for key, pieces in self.by_block.items()}
        return {**shaped_states, **block_states, **self.unsliced}


def _offset(partition: Partition) -> int:
    return partition[0].offset


def _flattened(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state with what bitsandbytes puts into a dict of its own beside the rest."""
    quantized = state.get(QUANTIZED)
    return {**state, **quantized} if isinstance(quantized, dict) else state


def _per_element(key: str, value: TensorRef, end_element: int, code_count: int | None) -> bool:
    """Whether a tensor has an entry for each element up to ``end_element``.

    ``code_count`` is how many elements the optimizer keeps codes of, ``None`` if
    it keeps none.
    """
    if code_count is None:
        return end_element <= value.numel
    return value.numel == code_count and not key.startswith(("qmap", SCALES))


def _block_size(key: str, value: TensorRef, code_count: int | None) -> int | None:
    """The elements of a block, if a vector has a scale for each block of codes."""
    if code_count is None or not key.startswith(SCALES):
        return None

    for block_size in BLOCKS:
        if value.numel == -(-code_count // block_size):
            return block_size

    return None


def _partitions(checkpoint: Checkpoint) -> Iterator[Partition]:
    """Every run of master weights with the optimizer's state for it."""
    for rank, state in enumerate(checkpoint.ranks):
        optimizer = state.optimizer
        optimizer_state = optimizer.get(
            "base_optimizer_state", optimizer.get("optimizer_state_dict")
        )

        if "fp32_flat_groups" in optimizer:
            yield from of_sub_groups(checkpoint.place.folder, rank, state)
        elif "local_sub_partitions_of_fp32_groups" in optimizer:
            key = "local_sub_partitions_of_fp32_groups"
            for index, group in enumerate(state.optimizer_fields.required(key, list)):
                states = optimizer_state[index] if isinstance(optimizer_state, list) else []
                states = typed.expected(state.path, "the optimizer's state", states, list)
                yield from _with_states(state_files.tensors(state, group, key), states)
        else:
            key = "single_partition_of_fp32_groups"
            masters = state_files.tensors(state, optimizer.get(key), key)
            states = _with_own_momentum(checkpoint, rank, masters, optimizer_state)
            yield from _with_states(masters, states)

    if not checkpoint.ranks:
        yield from _without_zero(checkpoint.model)


def _with_states(masters: Any, states: Any) -> Iterator[Partition]:
    """Master tensors and their state; ``None``, as SGD has it, is an empty one."""
    for master, state in zip_longest(masters, states):
        has_elements = isinstance(master, TensorRef) and master.numel
        if has_elements and isinstance(state, (dict, NoneType)):
            yield master.extents[0], master.dtype.itemsize, state or {}


def _in_group_order(path: Path, optimizer_state: Any) -> list[Any]:
    """The state of each param group: a list (elastic), or a dict by parameter id."""
    if isinstance(optimizer_state, list):
        return list(optimizer_state)

    label = "the optimizer's state"
    fields = Section(path, label, typed.expected(path, label, optimizer_state, dict))
    states_by_id = fields.required("state", dict)
    if not fields.values.get("param_groups"):
        return [states_by_id[key] for key in sorted(typed.numbers(path, label, [*states_by_id]))]

    groups = fields.dicts("param_groups")
    ids = [Section(path, "param_groups", group).numbers("params") for group in groups]
    return [states_by_id.get(index) for indices in ids for index in indices]


def _with_own_momentum(
    checkpoint: Checkpoint, rank: int, masters: Any, optimizer_state: Any
) -> list[Any]:
    """The state of each param group, Muon's momentum for the rank's elements alone."""
    rank_path = checkpoint.ranks[rank].path
    states = _in_group_order(rank_path, optimizer_state)
    is_dict = isinstance(optimizer_state, dict)
    options = (optimizer_state.get("param_groups") if is_dict else None) or ()
    shapes = state_files.shapes(checkpoint.model, "param_shapes") or []
    whole_momentum = muon.keeps_whole_momentum(checkpoint.model) and not checkpoint.bf16_optimizer

    for index, group_options in enumerate(options if whole_momentum else ()):
        group_state = typed.item(rank_path, "the optimizer's state", states, index)
        state = typed.expected(rank_path, "the state of a group", group_state or {}, dict)
        buffer = state.get(muon.MOMENTUM)
        if not muon.is_muon_group(group_options) or not isinstance(buffer, TensorRef):
            continue

        # shorter than the partition only where no other rank has any
        first_rank = checkpoint.ranks[0]
        key = "single_partition_of_fp32_groups"
        first_masters = state_files.tensors(first_rank, first_rank.optimizer.get(key), key)
        partition_size = typed.item(first_rank.path, key, first_masters, index).numel
        own_numel = typed.item(rank_path, key, masters, index).numel
        group_shapes = typed.item(checkpoint.model.path, "param_shapes", shapes, index)
        paddings = state_files.alignment_paddings(first_rank, len(first_masters))[index]

        start = rank * partition_size
        rank_parts = muon.overlaps(group_shapes, start, partition_size, paddings)
        consequence = "it is not known whose elements it has"
        label = f"group {index}"
        muon.require_whole(rank_path, label, buffer, group_shapes, rank_parts, consequence)
        own_momentum = muon.own_elements(buffer, group_shapes, rank_parts, own_numel)
        states[index] = {**state, muon.MOMENTUM: own_momentum}

    return states


def of_sub_groups(folder: Path, rank: int, state: State) -> Iterator[Partition]:
    """The sub-groups in an optimizer file of stage 3, with the state of each.

    ``folder`` is the tag's, ``rank`` the one that the file is of.
    """
    optimizer_state = state.optimizer.get("optimizer_state_dict")
    flat_vectors = state_files.tensors(
        state, state.optimizer["fp32_flat_groups"], "fp32_flat_groups"
    )
    label = "the optimizer's state"
    fields = Section(state.path, label, typed.expected(state.path, label, optimizer_state, dict))
    states_by_index = fields.required("state", dict)
    states = [states_by_index.get(index) for index in range(len(flat_vectors))]
    yield from _with_states(flat_vectors, states)

    # what was offloaded to NVMe is empty in the file, and lies in files of its own
    swap_folder = folder / "offloaded_tensors" / f"rank{rank:02d}"

    for flat, values in zip(flat_vectors, states, strict=True):
        tensor_id = flat.attributes.get("ds_id")
        if flat.numel or not isinstance(tensor_id, str):
            continue

        master_path = swap_folder / f"{tensor_id}.tensor.swp"
        if not stores.is_file(master_path):
            continue
        if not isinstance(values, (dict, NoneType)):
            continue

        swapped_values = dict(values or {})
        for key, value in swapped_values.items():
            value_path = swap_folder / f"{key}-{tensor_id}.tensor.swp"
            if isinstance(value, TensorRef) and not value.numel and stores.is_file(value_path):
                numel = stores.status(value_path).size // value.dtype.itemsize
                value_extent = Extent(value_path, 0, numel * value.dtype.itemsize)
                swapped_values[key] = TensorRef(value.dtype, (numel,), Listed([value_extent]))

        master_extent = Extent(master_path, 0, stores.status(master_path).size)
        yield master_extent, flat.dtype.itemsize, swapped_values


def _without_zero(model: State) -> Iterator[Partition]:
    optimizer = model.root.get("optimizer")
    optimizer_state = optimizer if isinstance(optimizer, dict) else {}
    masters = optimizer_state.get("fp32_groups_flat")
    if masters is None and "fp32_groups" in optimizer_state:
        groups = Section(model.path, "optimizer", optimizer_state).required("fp32_groups", list)
        masters = [
            master
            for group in groups
            for master in state_files.tensors(model, group, "fp32_groups")
        ]
    if masters is None:
        raise CheckpointError(
            f"{model.path}: the optimizer's state of an fp32 run without ZeRO has no names",
            "unsupported",
        )

    states = _in_group_order(model.path, optimizer_state.get("optimizer_state_dict"))
    yield from _with_states(state_files.tensors(model, masters, "fp32_groups_flat"), states)
