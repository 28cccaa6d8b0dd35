"""Muon's momentum under stages 1 and 2, which every rank keeps for whole parameters.

DeepSpeed orthogonalizes the momentum of a whole matrix. So where the optimizer is not
offloaded, a rank's ``momentum_buffer`` of a group is the momenta of all parameters that
have elements in its partition, whole, one behind the other and without padding; a rank
with padding alone has none:

    parameters       |--- a ---|------ b ------|- c -|pad|
    ranks            |------ 0 -------|------ 1 ---------|
    buffer of 0      |--- a ---|------ b ------|
    buffer of 1      |------ b ------|- c -|

What several ranks keep is the same, bit for bit, since each folds the whole gradient
into it, which all of them have from one all-reduce. Whether it is so is looked at;
nothing else is cut up again.

An offloaded optimizer, stage 3 and BF16_Optimizer keep it for the elements of the
partition, as any state. Sources: ``get_flat_partition``, ``_muon_momentum_buffer`` and
``_apply_muon_updates_cpu_offload`` in DeepSpeed 0.19.8
``runtime/zero/stage_1_and_2.py``, ``_muon_update_sub_group`` in ``stage3.py``,
``_prepare_muon_updates`` in ``bf16_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from converters import tensors
from converters.errors import CheckpointError, MalformedError
from converters.storage import open_files
from converters.tensors import TensorRef
from converters.zero.files.state_files import State
from converters.zero.partitioning import Shapes, joined, stage12

MOMENTUM = "momentum_buffer"
COMPARE_BYTES = 1 << 20  # bytes compared at a time
# the name, its first element here, how many elements, where in the partition
Part = tuple[str, int, int, int]


def offloaded(model: State) -> bool:
    """Whether the run's optimizer was offloaded, by its configuration."""
    section = ("zero_optimization",)
    device = model.setting(*section, "offload_optimizer", "device")
    return device not in (None, "none") or model.setting(*section, "cpu_offload") is True


def is_deepspeed_muon(model: State) -> bool:
    """Whether the optimizer is DeepSpeed's own Muon, by the configuration.

    Of another that has ``use_muon`` in its groups nothing is known.
    """
    optimizer_type = model.setting("optimizer", "type")
    return isinstance(optimizer_type, str) and optimizer_type.lower() == "muon"


def keeps_whole_momentum(model: State) -> bool:
    """Whether ranks of stage 1 or 2 keep the momentum for whole parameters."""
    return is_deepspeed_muon(model) and not offloaded(model)


def is_muon_group(options: Mapping[str, Any] | None) -> bool:
    """Whether a param group is one that Muon updates, not one left to Adam."""
    return options is not None and options.get("use_muon") is True


def ordered(shapes: Shapes) -> list[str]:
    """The names of a Muon group in the order that ``MuonWithAuxAdam`` has them.

    By shape, the largest first, else as it was given them (``sorted(...,
    reverse=True)`` in ``muon/original_muon.py``). Under ``zero.Init`` it sees no
    shapes, and leaves them as they were.
    """
    return sorted(shapes, key=lambda name: tuple(shapes[name]), reverse=True)


def overlaps(
    shapes: Shapes, start: int, partition_size: int, paddings: Sequence[int] = ()
) -> list[Part]:
    """The parts of a group that a rank has.

    Its partition is the ``partition_size`` elements from ``start`` on.
    """
    rank_parts: list[Part] = []
    offset = 0

    for index, (name, shape) in enumerate(shapes.items()):
        first_element = max(offset, start)
        end_element = min(offset + prod(shape), start + partition_size)

        if first_element < end_element:
            count = end_element - first_element
            rank_parts.append((name, first_element - offset, count, first_element - start))

        offset += prod(shape) + (paddings[index] if paddings else 0)

    return rank_parts


def require_whole(
    path: Path,
    group_label: str,
    buffer: TensorRef,
    shapes: Shapes,
    rank_parts: Sequence[Part],
    consequence: str,
) -> None:
    """``CheckpointError`` unless a rank's buffer is as long as these parts, whole.

    ``group_label`` names the group, ``consequence`` says what does not go on then.
    """
    expected_numel = sum(prod(shapes[name]) for name, *_ in rank_parts)
    if buffer.numel != expected_numel:
        raise CheckpointError(
            f"{path}: Muon's {MOMENTUM} of {group_label} has {buffer.numel} elements, "
            f"the parameters that this rank has parts of have {expected_numel}: "
            f"{consequence}",
            "unsupported",
        )


def own_elements(
    buffer: TensorRef, shapes: Shapes, rank_parts: Sequence[Part], numel: int
) -> TensorRef:
    """The ``numel`` elements of a rank's buffer that are its own partition.

    Padding between parameters is included.
    """
    pieces: list[TensorRef] = []
    offset = filled_numel = 0
    end = max((position + count for _, _, count, position in rank_parts), default=0)
    if end > numel:
        raise MalformedError(f"a partition of {numel} elements has parameters up to {end}")

    for name, first_element, count, position in rank_parts:
        padding = tensors.zeros(buffer.dtype, position - filled_numel)
        pieces += [padding, buffer.narrow(offset + first_element, count)]
        offset += prod(shapes[name])
        filled_numel = position + count

    return TensorRef.concat([*pieces, tensors.zeros(buffer.dtype, numel - filled_numel)])


def copies(
    buffer: TensorRef, shapes: Shapes, rank_parts: Sequence[Part]
) -> Iterator[tuple[str, TensorRef]]:
    """The parameters in a rank's buffer, whole, that other ranks have parts of, too."""
    offset = 0
    for name, _, count, _ in rank_parts:
        numel = prod(shapes[name])
        if count < numel:
            yield name, buffer.narrow(offset, numel)
        offset += numel


def rank_buffers(
    momenta: Mapping[str, TensorRef],
    world_size: int,
    partition_size: int,
    paddings: Sequence[int],
) -> list[TensorRef]:
    """Each rank's buffer, empty where it has padding alone.

    ``momenta`` are in the order of the group.
    """
    shapes = {name: momentum.shape for name, momentum in momenta.items()}
    no_elements = tensors.zeros(next(iter(momenta.values())).dtype, 0)

    parts_by_rank = [
        overlaps(shapes, rank * partition_size, partition_size, paddings)
        for rank in range(world_size)
    ]
    return [
        joined([no_elements, *(momenta[name] for name, *_ in rank_parts)])
        for rank_parts in parts_by_rank
    ]


def same_bytes(tensor: TensorRef, reference: TensorRef) -> bool:
    """Whether two tensors hold the same bytes. Reads them, a piece at a time."""
    if (tensor.dtype, tensor.numel) != (reference.dtype, reference.numel):
        return False

    piece_numel = COMPARE_BYTES // tensor.dtype.itemsize
    for offset in range(0, tensor.numel, piece_numel):
        count = min(piece_numel, tensor.numel - offset)
        data = _read_bytes(tensor.narrow(offset, count))
        if data != _read_bytes(reference.narrow(offset, count)):
            return False

    return True


def own_momenta(
    ranks: Sequence[State],
    group_label: str,
    masters: Sequence[TensorRef],
    states: Sequence[Mapping[str, Any]],
    shapes: Shapes,
    paddings: Sequence[int],
    consequence: str,
) -> list[TensorRef]:
    """Muon's momentum for the elements of each rank; none where no step was taken yet.

    ``CheckpointError``, which ends with ``consequence``, if the ranks do not keep what
    this module says, or not the same.
    """
    # shorter than the partition only where no other rank has any
    partition_size = masters[0].numel
    parts_by_rank = [
        overlaps(shapes, rank * partition_size, partition_size, paddings)
        for rank in range(len(masters))
    ]

    stored_values = [state.get(MOMENTUM) for state in states]
    stored_buffers = [value for value in stored_values if isinstance(value, TensorRef)]
    if not stored_buffers:
        return []

    # a rank with padding alone has none
    no_elements = tensors.zeros(stored_buffers[0].dtype, 0)
    buffers = [value if isinstance(value, TensorRef) else no_elements for value in stored_values]
    by_rank = list(zip(ranks, buffers, parts_by_rank, strict=True))
    for state, buffer, rank_parts in by_rank:
        require_whole(state.path, group_label, buffer, shapes, rank_parts, consequence)

    momenta = [
        own_elements(buffer, shapes, rank_parts, master.numel)
        for (_, buffer, rank_parts), master in zip(by_rank, masters, strict=True)
    ]
    joined_momenta = dict(stage12(momenta, shapes, paddings))
    for state, buffer, rank_parts in by_rank:
        references = copies(buffer, shapes, rank_parts)
        _require_same(state.path, references, joined_momenta, consequence)

    return momenta


def _require_same(
    path: Path,
    references: Iterable[tuple[str, TensorRef]],
    momenta: Mapping[str, TensorRef],
    consequence: str,
) -> None:
    """Raises unless what a rank keeps whole is what all ranks together have of it."""
    for name, reference in references:
        if not same_bytes(reference, momenta[name]):
            raise CheckpointError(
                f"{path}: Muon's {MOMENTUM} of {name} is not that of "
                f"the other ranks that have parts of it: {consequence}",
                "unsupported",
            )


def _read_bytes(tensor: TensorRef) -> bytearray:
    data = bytearray(tensor.nbytes)
    open_files.read_extents(memoryview(data), tensor.extents)
    return data
