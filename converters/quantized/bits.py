"""Integers of a few bits out of bytes and words."""

from __future__ import annotations

import numpy as np

from converters.cast import Array

# float4 (e2m1): sign, two bits of exponent, one of mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT4 = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # where the columns of a word lie in it


def nibbles(data: Array, high_first: bool = False) -> Array:
    """The two halves of each byte, the lower first or the higher."""
    return looked_up(data, np.arange(16, dtype=np.uint8), high_first)


def looked_up(data: Array, table: Array, high_first: bool = False) -> Array:
    """The values of a table of 16 for each half of each byte;
    a look-up for two at once."""
    lower, higher = np.tile(table, 16), np.repeat(table, 16)
    halves = (higher, lower) if high_first else (lower, higher)
    pairs = np.ascontiguousarray(np.stack(halves, axis=-1))
    pair_values: Array = pairs.view(f"V{2 * table.itemsize}").reshape(256)[data]
    return pair_values.view(table.dtype).reshape(*data.shape[:-1], -1)


def unpacked(words: Array, size: int, count: int) -> Array:
    """The first ``count`` integers of ``size`` bits in each row of 32-bit words.

    The bits of a row follow one another, the lowest first; an integer may begin in one
    word and end in the next.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if size == 8:
        return octets[..., :count]
    if size == 4:
        return nibbles(octets)[..., :count]

    mask = np.uint32((1 << size) - 1)
    if 32 % size == 0:
        shifts = np.arange(0, 32, size, dtype=np.uint32)
        codes = (words[..., None] >> shifts & mask).astype(np.uint8)
        return codes.reshape(*words.shape[:-1], -1)[..., :count]

    bit_positions = np.arange(count, dtype=np.int64) * size
    word, shift = bit_positions >> 5, (bit_positions & 31).astype(np.uint64)
    next_word = np.minimum(word + 1, words.shape[-1] - 1)
    pairs = words[..., word].astype(np.uint64) | words[..., next_word].astype(np.uint64) << 32

    return (pairs >> shift & np.uint64(mask)).astype(np.uint8)


def unpacked_awq(words: Array) -> Array:
    """The 4-bit integers of a matrix of words, in the order of AWQ."""
    codes = nibbles(np.ascontiguousarray(words).view(np.uint8))
    return codes.reshape(-1, 8)[:, _AWQ].reshape(codes.shape)
