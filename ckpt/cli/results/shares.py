"""The results of a command that wrote one share of an output, and of their joining."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinResult:
    """The output of shares that were joined before an interruption, now under its name."""

    output: Path
    dry_run: bool
