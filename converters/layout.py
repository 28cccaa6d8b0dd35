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
from math import prod

from converters.tensors import TensorRef

Shapes = Mapping[str, tuple[int, ...]]


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
