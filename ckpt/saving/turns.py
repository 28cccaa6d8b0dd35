"""Ranks of a node that load by turns, where there is not the memory for all of them at once.

Files that cannot be mapped are read whole. So each node has as many places as fit into its memory:
a rank takes one before it reads the first of them, and gives it back when what it has read is where
it belongs. Between the two DeepSpeed (0.19.8: ``_load_checkpoint``, ``_load_zero_checkpoint`` in
runtime/engine.py) waits for no other rank; so whoever waits for a place holds nobody up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.saving.memory import available, budget
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
class Turn:
    """A rank's place in the order: it loads when the rank ``after`` is done, or at once."""

    ranks: Ranks
    folder: Path
    reads: int
    after: int | None = None
    begun: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Waits for this rank's turn, once. ``CheckpointError`` if there is too little memory yet.

        Or if another rank failed, or is gone.
        """
        if self.begun:
            return
        self.begun = True
        if self.after is not None:
            self.ranks.hear("loaded", self.after)
        there = available()
        if there and there < self.reads:
            raise CheckpointError(
                f"{self.folder}: it takes {self.reads:,} bytes of memory to read this rank's "
                f"files, {there:,} are available by now; {_ADVICE}",
                "refused",
            )

    def end(self) -> None:
        """Lets the next one load."""
        if self.begun and not self.over:
            self.over = True
            self.ranks.say("loaded")


_ADVICE = (
    "they cannot be mapped: if they are of torch's old format, save without "
    "checkpoint_serialization=false; if this filesystem maps no files, copy them to another; or "
    "load with fewer ranks a node"
)


def there(given: str | int | None) -> int:
    """The memory that a node's ranks may take, in bytes: what was given, or is available."""
    return available() if given is None else max(1, budget(given))


def require_own_order(engine: Any, folder: Path) -> None:
    """``CheckpointError`` if DeepSpeed has an order of its own, in which ranks wait for others."""
    if engine._config.zero_config.pipeline_loading_checkpoint:
        raise CheckpointError(
            f"{folder}: there is not the memory for all ranks of a node to load at once; unset "
            "zero_optimization.pipeline_loading_checkpoint, so that they can take turns here",
            "refused",
        )


def at_once(folder: Path, needs: Sequence[Need], there: int) -> int:
    """How many ranks of a node can load at a time, with ``there`` bytes of memory (0: not known).

    What those before keep stays in memory, so it is counted of all. ``CheckpointError`` with
    numbers if there is no room for one.
    """
    kept = sum(need.keeps for need in needs)
    most = max((need.reads - need.keeps for need in needs), default=0)
    if not there or kept + len(needs) * most <= there:
        return len(needs)
    if kept + most > there:
        one = max(need.reads for need in needs)
        raise CheckpointError(
            f"{folder}: the {len(needs)} ranks of this node, one at a time, would need "
            f"{kept + most:,} bytes of memory to load ({one:,} are read by one rank, {kept:,} "
            f"stay in all), {there:,} are available; {_ADVICE}",
            "refused",
        )
    return (there - kept) // most


def order(here: Sequence[int], places: int) -> Mapping[int, int]:
    """Whom each of a node's ranks waits for: the one that is ``places`` before it."""
    return dict(zip(here[places:], here, strict=False))
