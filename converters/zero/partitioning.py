"""How ZeRO cuts parameters up, as two short generators over ``narrow`` and
``concat``. No I/O.

Stages 1 and 2 flatten each parameter group into one vector and cut it into equal runs:

    parameters   |--- a ---|------ b ------|- c -|pad|
    ranks        |------ 0 -------|------ 1 ---------|

Padding stands only at the end, where ranks may hold less or nothing; with
``parameter_alignment`` (DeepSpeed after 0.19.5) also behind single parameters, and then
it is recorded. Stage 3 cuts each parameter into equal runs, padding the last:

    rank 0       |- a -|-- b --|-c-|
    rank 1       |- a -|-- b --|-c+pad|

The same holds for whatever the optimizer keeps for each element. Sources: DeepSpeed
0.19.8 ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, ``utils/zero_to_fp32.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd, prod

from converters.detect.filenames import SWAPPED
from converters.errors import MalformedError
from converters.partitioned import Partitioned, RankVectors, few_listed
from converters.rank_cuts import Cuts, RankPart
from converters.tensors import TensorRef, zeros

Shapes = Mapping[str, tuple[int, ...]]


def stage12(
    ranks: Sequence[TensorRef], shapes: Shapes, paddings: Sequence[int] = ()
) -> Iterator[tuple[str, TensorRef]]:
    """The parameters of a group from its partitions, one a rank, in rank order.

    ``paddings`` are the elements left empty behind each parameter. ``MalformedError``
    if the partitions are too short. What is left over at the end: ``unused_elements``.
    """
    missing_numel = -unused_elements(ranks, shapes, paddings)
    if missing_numel > 0:
        raise MalformedError(f"the partitions of a group lack {missing_numel} elements")

    flat = joined(ranks)
    for name, (offset, shape) in places12(shapes, paddings):
        yield name, flat.narrow(offset, prod(shape)).view(*shape)


def joined(parts: Iterable[TensorRef]) -> TensorRef:
    """The vector that the ranks' parts make, one part after another.

    ``MalformedError`` for no parts, or parts of several types.
    """
    refs = list(parts)
    types = sorted({ref.dtype.value for ref in refs})
    if len(types) != 1:
        raise MalformedError(f"the parts of a tensor are of types {' and '.join(types) or 'none'}")
    return TensorRef.concat(refs)


def places12(
    shapes: Shapes, paddings: Sequence[int] = ()
) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """The first element in its group, and the shape, of each parameter."""
    offset = 0
    for index, (name, shape) in enumerate(shapes.items()):
        yield name, (offset, shape)
        offset += prod(shape) + (paddings[index] if paddings else 0)


def unused_elements(
    ranks: Sequence[TensorRef], shapes: Shapes, paddings: Sequence[int] = ()
) -> int:
    """Elements of a group's partitions that no parameter uses.

    They are its padding, if all is well.
    """
    used_numel = sum(prod(shape) for shape in shapes.values()) + sum(paddings)
    return sum(rank.numel for rank in ranks) - used_numel


def stage3(ranks: Sequence[TensorRef], shapes: Shapes) -> Iterator[tuple[str, TensorRef]]:
    """The parameters of a sub-group from its flat vectors, one a rank, in rank order.

    ``MalformedError`` if a vector is too short. Its exact length: ``subgroup_size``.
    """
    length = subgroup_size(shapes, len(ranks))
    shortest = min((rank.numel for rank in ranks), default=0)
    if shortest < length:
        raise MalformedError(f"a vector of a sub-group has {shortest} elements of {length}")

    vectors = _rank_vectors(ranks)
    offset = 0
    for name, shape in shapes.items():
        piece_size, numel = partition_numel(shape, len(ranks)), prod(shape)
        if vectors is None or not numel:
            pieces = [rank.narrow(offset, piece_size) for rank in ranks]
            yield name, joined(pieces).narrow(0, numel).view(*shape)
        else:
            itemsize = ranks[0].dtype.itemsize
            extents = Partitioned(
                vectors, offset * itemsize, piece_size * itemsize, 0, numel * itemsize
            )
            yield name, TensorRef(ranks[0].dtype, shape, few_listed(extents))

        offset += piece_size


def _rank_vectors(ranks: Sequence[TensorRef]) -> RankVectors | None:
    """The ranks' vectors,
    where each is one run of bytes in a file of torch.save of its own."""
    extents = [rank.extents[0] for rank in ranks if len(rank.extents) == 1]
    paths = {extent.path for extent in extents if not extent.path.name.endswith(SWAPPED)}
    same_type = len({rank.dtype for rank in ranks}) == 1
    return RankVectors(extents) if same_type and len(paths) == len(ranks) else None


def partition_numel(shape: Sequence[int], world_size: int) -> int:
    """Elements of a stage 3 parameter that each rank holds, padding included."""
    return -(-prod(shape) // world_size)


def subgroup_size(shapes: Shapes, world_size: int) -> int:
    """Elements of a sub-group's flat vector on each rank."""
    return sum(partition_numel(shape, world_size) for shape in shapes.values())


def padding_for(numels: Sequence[int], itemsize: int) -> list[int]:
    """Elements that parameter_alignment leaves empty behind each parameter but the last.

    Every parameter begins at a multiple of 16 bytes; ``itemsize`` is that of the
    16-bit weights.
    """
    multiple = 16 // gcd(16, itemsize)
    offset = 0
    paddings: list[int] = []

    for numel in numels:
        paddings.append(-(offset + numel) % multiple)
        offset += numel + paddings[-1]
    return [*paddings[:-1], 0] if paddings else []


def rank_size(numel: int, world_size: int) -> int:
    """Elements of each rank's run of a group of ``numel``, inner padding included."""
    # runs begin at multiples of two: 4 bytes in 16 bits
    return 2 * -(-numel // (2 * world_size))


def unpadded_sizes(numel: int, world_size: int) -> list[int]:
    """Elements of each rank's run that are not padding at the group's end."""
    partition_size = rank_size(numel, world_size)
    starts = [rank * partition_size for rank in range(world_size)]
    return [min(max(numel - start, 0), partition_size) for start in starts]


def partition_group(
    parameters: Sequence[TensorRef], world_size: int, paddings: Sequence[int] = ()
) -> list[TensorRef]:
    """The ranks' runs of a group, padding included: what ``stage12`` takes apart again.

    ``MalformedError`` if the group is empty, or its parameters are of several types.
    """
    pieces = []
    for index, parameter in enumerate(parameters):
        pieces += [parameter, zeros(parameter.dtype, paddings[index] if paddings else 0)]

    vector = joined(pieces)
    partition_size = rank_size(vector.numel, world_size)
    end_padding = zeros(vector.dtype, partition_size * world_size - vector.numel)
    vector = TensorRef.concat([vector, end_padding])

    starts = [rank * partition_size for rank in range(world_size)]
    return [vector.narrow(start, partition_size) for start in starts]


def partition_parameter(parameter: TensorRef, rank: int, world_size: int) -> TensorRef:
    """A rank's piece of a parameter, padded to the length that all have."""
    piece_size = partition_numel(parameter.shape, world_size)
    start = min(rank * piece_size, parameter.numel)
    piece = parameter.narrow(start, min(piece_size, parameter.numel - start))
    if piece.numel == piece_size:
        return piece
    return TensorRef.concat([piece, zeros(parameter.dtype, piece_size - piece.numel)])


def partition_parameters(parameters: Sequence[TensorRef], world_size: int) -> list[TensorRef]:
    """The ranks' vectors of a sub-group:
    their pieces of each parameter, one after another.

    ``MalformedError`` if there are none, or they are of several types.
    """
    is_located = all(type(parameter) is TensorRef for parameter in parameters)
    has_one_type = len({parameter.dtype for parameter in parameters}) == 1
    if not is_located or not has_one_type or not any(ref.numel for ref in parameters):
        return [
            joined(partition_parameter(parameter, rank, world_size) for parameter in parameters)
            for rank in range(world_size)
        ]

    dtype = parameters[0].dtype
    numels = [partition_numel(parameter.shape, world_size) for parameter in parameters]
    cuts = Cuts(
        tuple(parameter.extents for parameter in parameters),
        tuple(numel * dtype.itemsize for numel in numels),
        world_size,
    )
    shape = (sum(numels),)
    return [TensorRef(dtype, shape, RankPart(cuts, rank)) for rank in range(world_size)]


def sub_groups(shapes: Shapes, world_size: int, size: int) -> list[dict[str, tuple[int, ...]]]:
    """A param group cut up as ``_create_fp16_sub_groups`` does.

    A sub-group ends with the parameter that makes its vector ``size`` elements long or
    longer.
    """
    groups: list[dict[str, tuple[int, ...]]] = []
    filled_numel = size
    for name, shape in shapes.items():
        if filled_numel >= size:
            groups.append({})
            filled_numel = 0
        groups[-1][name] = shape
        filled_numel += partition_numel(shape, world_size)

    return groups


def round_robin_order(names: Sequence[str], world_size: int) -> list[str]:
    """The order of a group under round_robin_gradients: dealt out to the ranks in turns.

    ``_round_robin_reorder`` of ``stage_1_and_2.py``.
    """
    return [name for rank in range(world_size) for name in names[rank::world_size]]


def undo_round_robin(names: Sequence[str], world_size: int) -> list[str]:
    """The order that ``round_robin_order`` was given."""
    positions = round_robin_order([str(position) for position in range(len(names))], world_size)
    return [name for _, name in sorted(zip(map(int, positions), names, strict=True))]
