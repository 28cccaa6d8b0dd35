"""Recognizes a file by its first bytes, whatever its name says."""

from __future__ import annotations

from converters.lazy_pattern import LazyPattern

HEAD_BYTES = 512  # as far as any sign here reaches

# The header is JSON, and begins with the metadata or with a tensor (safetensors 0.8,
# README).
_HEADER = LazyPattern(
    rb'\s*\{\s*"(?:__metadata__"\s*:\s*\{|(?:[^"\\]|\\.)*"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)")'
)

# The magic number of torch's files before zips, pickled: in protocols 2 and 3 right
# after the protocol, in 4 and 5 in a frame of 13 bytes (torch 2.13 ``serialization.py``:
# ``_legacy_save``).
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_FRAME = b"\x95" + len(_MAGIC).to_bytes(8, "little")
_LEGACY_HEADS = (
    *(b"\x80" + bytes([protocol]) + _MAGIC for protocol in (2, 3)),
    *(b"\x80" + bytes([protocol]) + _FRAME + _MAGIC for protocol in (4, 5)),
)
LEGACY_HEAD_BYTES = max(map(len, _LEGACY_HEADS))
# the same in protocols 0 and 1, which spell it out
_SPELT_OUT = b"L119547037146038801333356L\n."


def is_legacy_torch(head: bytes) -> bool:
    """Whether a file with these first bytes is of ``torch.save`` before zips."""
    return head.startswith(_LEGACY_HEADS)


def is_oldest_torch(head: bytes) -> bool:
    """Whether it is one whose pickles are of protocol 0 or 1."""
    return head.startswith(_SPELT_OUT)


def is_safetensors(head: bytes) -> bool:
    """Whether a file with these first bytes is in safetensors."""
    length = int.from_bytes(head[:8], "little")
    return 2 <= length < 1 << 32 and _HEADER.match(head[8:]) is not None
