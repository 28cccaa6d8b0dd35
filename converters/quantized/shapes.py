"""Whether the shapes of codes and constants fit each other."""

from __future__ import annotations

from collections.abc import Sequence

_FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers; bitsandbytes 0.50
USUAL_BLOCK = 128  # rows and columns that share a factor, where nothing else is said


def four_bit_blocks(nbytes: int, count: int) -> bool:
    """Whether ``nbytes`` of 4-bit codes
    are ``count`` blocks of a size that bitsandbytes has."""
    return any(
        -(-numbers // block) == count
        for block in _FOUR_BIT_BLOCKS
        for numbers in (2 * nbytes, 2 * nbytes - 1)
    )


def blocks(
    shape: Sequence[int], scale: Sequence[int], stated: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """The number of elements of each axis that share a factor; ``None`` if the shapes
    do not fit.

    ``stated`` are the sizes of a block along the last axes as a configuration gives
    them.
    """
    rank = len(shape)
    if all(size == 1 for size in scale):  # one factor for all
        return tuple(max(size, 1) for size in shape)
    if len(scale) == 1 and shape and scale[0] == shape[0]:  # one for each row
        return (1, *(max(size, 1) for size in shape[1:]))
    if len(scale) != rank:
        return None

    block_sizes = []
    for axis, (size, count) in enumerate(zip(shape, scale, strict=True)):
        block = _block(
            size,
            count,
            stated[axis - rank] if rank - axis <= len(stated) else 0,
        )
        if block is None:
            return None
        block_sizes.append(block)

    return tuple(block_sizes)


def _block(size: int, count: int, stated: int) -> int | None:
    """Elements of an axis that share a factor, when there are ``count`` factors."""
    if not count or count > size:
        return None

    for block in (stated, size if count == 1 else 0, 1 if count == size else 0, USUAL_BLOCK):
        if block > 0 and -(-size // block) == count:
            return block

    return size // count if size % count == 0 else None
