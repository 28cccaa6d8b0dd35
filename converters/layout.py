"""How ZeRO cuts parameters up, as two short generators over ``narrow`` and ``concat``. No I/O.

Stages 1 and 2 flatten each parameter group into one vector and cut it into equal runs:

    parameters   |--- a ---|------ b ------|- c -|pad|
    ranks        |------ 0 -------|------ 1 ---------|

Padding stands only at the end, where ranks may hold less or nothing; with ``parameter_alignment``
(DeepSpeed after 0.19.5) also behind single parameters, and then it is recorded. Stage 3 cuts each
parameter into equal runs, padding the last:

    rank 0       |- a -|-- b --|-c-|
    rank 1       |- a -|-- b --|-c+pad|

The same holds for whatever the optimizer keeps for each element. Sources: DeepSpeed 0.19.8
``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, ``utils/zero_to_fp32.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd, prod
from pathlib import Path

from converters.tensors import DType, Extent, TensorRef

Shapes = Mapping[str, tuple[int, ...]]
ZEROS = Path("/dev/zero")


def stage12(
    ranks: Sequence[TensorRef], shapes: Shapes, paddings: Sequence[int] = ()
) -> Iterator[tuple[str, TensorRef]]:
    """The parameters of a group from its partitions, one a rank, in rank order.

    ``paddings`` are the elements left empty behind each parameter. ``ValueError`` if the partitions
    are too short. What is left over at the end: ``leftover12``.
    """
    flat, at = TensorRef.concat(ranks), 0
    for index, (name, shape) in enumerate(shapes.items()):
        yield name, flat.narrow(at, prod(shape)).view(*shape)
        at += prod(shape) + (paddings[index] if paddings else 0)


def leftover12(ranks: Sequence[TensorRef], shapes: Shapes, paddings: Sequence[int] = ()) -> int:
    """Elements of a group's partitions that no parameter uses: its padding, if all is well."""
    used = sum(prod(shape) for shape in shapes.values()) + sum(paddings)
    return sum(rank.numel for rank in ranks) - used


def stage3(ranks: Sequence[TensorRef], shapes: Shapes) -> Iterator[tuple[str, TensorRef]]:
    """The parameters of a sub-group from its flat vectors, one a rank, in rank order.

    ``ValueError`` if a vector is too short. Its exact length: ``length3``.
    """
    at = 0
    for name, shape in shapes.items():
        run = partition_numel(shape, len(ranks))
        whole = TensorRef.concat(rank.narrow(at, run) for rank in ranks)
        yield name, whole.narrow(0, prod(shape)).view(*shape)
        at += run


def partition_numel(shape: Sequence[int], world_size: int) -> int:
    """Elements of a stage 3 parameter that each rank holds, the padding of the last included."""
    return -(-prod(shape) // world_size)


def length3(shapes: Shapes, world_size: int) -> int:
    """Elements of a sub-group's flat vector on each rank."""
    return sum(partition_numel(shape, world_size) for shape in shapes.values())


def padding_for(numels: Sequence[int], itemsize: int) -> list[int]:
    """The elements that parameter_alignment leaves empty behind each parameter but the last.

    Every parameter begins at a multiple of 16 bytes; ``itemsize`` is that of the 16-bit weights.
    """
    step, at, paddings = 16 // gcd(16, itemsize), 0, []
    for numel in numels:
        paddings.append(-(at + numel) % step)
        at += numel + paddings[-1]
    return [*paddings[:-1], 0] if paddings else []


def partition12(numel: int, world_size: int) -> int:
    """Elements of each rank's run of a group of ``numel``, inner padding included."""
    return 2 * -(-numel // (2 * world_size))  # runs begin at multiples of two: 4 bytes in 16 bits


def lean12(numel: int, world_size: int) -> list[int]:
    """Elements of each rank's run that are no padding at the group's end."""
    run = partition12(numel, world_size)
    return [min(max(numel - rank * run, 0), run) for rank in range(world_size)]


def cut12(
    parameters: Sequence[TensorRef], world_size: int, paddings: Sequence[int] = ()
) -> list[TensorRef]:
    """The ranks' runs of a group, padding included: what ``stage12`` takes apart again.

    ``ValueError`` if the group is empty, or its parameters are of several types.
    """
    parts = []
    for index, ref in enumerate(parameters):
        parts += [ref, zeros(ref.dtype, paddings[index] if paddings else 0)]
    flat = TensorRef.concat(parts)
    run = partition12(flat.numel, world_size)
    flat = TensorRef.concat([flat, zeros(flat.dtype, run * world_size - flat.numel)])
    return [flat.narrow(rank * run, run) for rank in range(world_size)]


def cut3(ref: TensorRef, rank: int, world_size: int) -> TensorRef:
    """A rank's piece of a parameter, padded to the length that all have."""
    run = partition_numel(ref.shape, world_size)
    start = min(rank * run, ref.numel)
    held = ref.narrow(start, min(run, ref.numel - start))
    if held.numel == run:
        return held
    return TensorRef.concat([held, zeros(ref.dtype, run - held.numel)])


def sub_groups(shapes: Shapes, world_size: int, size: int) -> list[dict[str, tuple[int, ...]]]:
    """A param group cut up as ``_create_fp16_sub_groups`` does: a sub-group ends with the
    parameter that makes its vector ``size`` elements long or longer."""
    found: list[dict[str, tuple[int, ...]]] = []
    held = size
    for name, shape in shapes.items():
        if held >= size:
            found.append({})
            held = 0
        found[-1][name] = shape
        held += partition_numel(shape, world_size)
    return found


def zeros(dtype: DType, numel: int) -> TensorRef:
    """Padding, to be read from where there is nothing else."""
    return TensorRef(dtype, (numel,), (Extent(ZEROS, 0, numel * dtype.itemsize),))


def dealt(names: Sequence[str], world_size: int) -> list[str]:
    """The order of a group under round_robin_gradients: dealt out to the ranks in turns.

    ``_round_robin_reorder`` of ``stage_1_and_2.py``.
    """
    return [name for rank in range(world_size) for name in names[rank::world_size]]


def dealt_back(names: Sequence[str], world_size: int) -> list[str]:
    """The order that ``dealt`` was given."""
    places = dealt([str(place) for place in range(len(names))], world_size)
    return [name for _, name in sorted(zip(map(int, places), names, strict=True))]
