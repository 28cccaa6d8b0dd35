"""The result of a command that wrote one share of an output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareResult:
    """Share ``share`` of ``share_count``, counted from 1, is on disk.

    ``missing_shares`` are the numbers of those that are not yet.
    """

    output: Path
    share: int
    share_count: int
    read_bytes: int
    write_bytes: int
    missing_shares: tuple[int, ...]
