"""The content of a ``.metadata``: tensors and the chunks of them, objects,
and their keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from converters.dcp.keys.leaves import KeyPath

Shape = tuple[int, ...]


class ItemPlace(NamedTuple):
    """Where an item lies: a file, the first byte, and how many. ``transforms`` are those
    that its bytes went through, such as a compression."""

    path: Path
    offset: int
    nbytes: int
    transforms: tuple[str, ...] = ()


class StoredChunk(NamedTuple):
    """A box of a tensor, ``sizes`` elements from ``offsets`` on, and where it is stored."""

    offsets: Shape
    sizes: Shape
    place: ItemPlace


class StoredTensor(NamedTuple):
    """A tensor in chunks. ``dtype`` is torch's name of the element type."""

    dtype: str
    shape: Shape
    chunks: tuple[StoredChunk, ...]


class Description(NamedTuple):
    """A folder of DCP: its leaves by their flat names, and the keys that lead to each.

    ``keys`` has a name for which the files say how the state dict was nested, in the
    order of the state dict. ``rank_count`` are the ranks that described what they wrote:
    one for all, or each.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, ItemPlace]
    keys: Mapping[str, KeyPath]
    rank_count: int
