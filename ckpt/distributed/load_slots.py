"""Ranks of a node that take turns to load,
where memory does not suffice for all at once.

Files that cannot be mapped are read whole. So each node has as many places as fit into
its memory: a rank takes one before it reads the first of them, and gives it back when
what it has read is where it belongs. Between the two DeepSpeed (0.19.8:
``_load_checkpoint``, ``_load_zero_checkpoint`` in runtime/engine.py) waits for no other
rank; so whoever waits for a place holds nobody up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.distributed.host_memory import available, budget
from ckpt.distributed.ranks import RankGroup
from converters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of host memory that a rank's load takes, and how many of these it keeps."""

    reads: int
    keeps: int

    def __post_init__(self) -> None:
        if not 0 <= self.keeps <= self.reads:
            raise ValueError(f"keeps {self.keeps} of {self.reads} bytes")


@dataclass(slots=True)
class LoadSlot:
    """A rank's place in the order: it loads when the rank ``after`` is done, or at once."""

    ranks: RankGroup
    folder: Path
    reads: int
    after: int | None = None
    has_begun: bool = field(default=False, init=False)
    has_ended: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Waits for this rank's turn, once.
        ``CheckpointError`` if there is too little memory yet.

        Or if another rank failed, or is gone.
        """
        if self.has_begun:
            return

        self.has_begun = True
        if self.after is not None:
            self.ranks.wait_for("loaded", self.after)
        available_bytes = available()
        if available_bytes and available_bytes < self.reads:
            raise CheckpointError(
                f"{self.folder}: it takes {self.reads:,} bytes of memory to read this "
                f"rank's files, {available_bytes:,} are available by now; {_ADVICE}",
                "refused",
            )

    def end(self) -> None:
        """Lets the next rank load."""
        if self.has_begun and not self.has_ended:
            self.has_ended = True
            self.ranks.post("loaded")


_ADVICE = (
    "they cannot be mapped: if they are of torch's old format, save without "
    "checkpoint_serialization=false; if this filesystem maps no files, copy them to "
    "another; or load with fewer ranks a node"
)


def node_memory(requested_budget: str | int | None) -> int:
    """The memory that a node's ranks may take,
    in bytes: what was given, or is available."""
    return available() if requested_budget is None else max(1, budget(requested_budget))


def slot_count(folder: Path, needs: Sequence[Need], available_bytes: int) -> int:
    """How many ranks of a node can load at a time.

    ``available_bytes`` is the memory for them (0: not known). What those before keep
    stays in memory, so it is counted of all. ``CheckpointError`` with numbers if there
    is no room for one.
    """
    kept_bytes = sum(need.keeps for need in needs)
    peak_bytes = max((need.reads - need.keeps for need in needs), default=0)
    if not available_bytes or kept_bytes + len(needs) * peak_bytes <= available_bytes:
        return len(needs)
    if kept_bytes + peak_bytes > available_bytes:
        largest_read = max(need.reads for need in needs)
        raise CheckpointError(
            f"{folder}: the {len(needs)} ranks of this node, one at a time, would need "
            f"{kept_bytes + peak_bytes:,} bytes of memory to load ({largest_read:,} "
            f"are read by one rank, {kept_bytes:,} stay in all), {available_bytes:,} "
            f"are available; {_ADVICE}",
            "refused",
        )

    return (available_bytes - kept_bytes) // peak_bytes


def predecessors(node_ranks: Sequence[int], slots: int) -> Mapping[int, int]:
    """The rank that each of a node's ranks waits for:
    the one that is ``slots`` before it."""
    return dict(zip(node_ranks[slots:], node_ranks, strict=False))
