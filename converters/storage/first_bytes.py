"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

from converters.lazy_pattern import LazyPattern

HEAD_BYTES = 512  # as far as any sign here reaches

# The header is JSON, and begins with the metadata or with a tensor (safetensors 0.8, README).
_HEADER = LazyPattern(
    rb'\s*\{\s*"(?:__metadata__"\s*:\s*\{|(?:[^"\\]|\\.)*"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)")'
)


def is_safetensors(head: bytes) -> bool:
    """Whether a file with these first bytes is in safetensors."""
    length = int.from_bytes(head[:8], "little")
    return 2 <= length < 1 << 32 and _HEADER.match(head[8:]) is not None
