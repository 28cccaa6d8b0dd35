"""Which checkpoints of a folder a resume may take, and in which order: those of one run.

A folder can hold checkpoints of several trainings (``ckpt.runs.lineage``). The line that saved last
is the one that goes on; the newest by step comes first. Checkpoints of other runs, and those that
the training went back from, are never taken by default: they are named, so that the user can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.runs import lineage
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint, Run, members
from ckpt.runs.run import order as by_step

Fits = Callable[[Manifest], bool]  # whether it was saved by as many ranks, and in the same stage


@dataclass(frozen=True, slots=True)
class Candidates:
    """``newest_first``: of the line that saved last, and those without a manifest.

    ``others``: committed checkpoints of other runs, and those that this one gave up.
    """

    folder: Path
    newest_first: tuple[Checkpoint, ...]
    others: tuple[Checkpoint, ...]

    def tell(self) -> None:
        """Says on stderr that there are others, and how to take them."""
        if not self.others:
            return
        run = next((c.manifest.run for c in self.newest_first if c.manifest), None)
        print(
            f"ckpt: {self.folder}: {lineage.shown(run)} saved last and goes on; there is also "
            f"{self.described()}, which a resume takes only by name",
            file=sys.stderr,
            flush=True,
        )

    def described(self) -> str:
        """The others as a phrase."""
        pairs = [(c.name, c.manifest.run if c.manifest else None) for c in self.others]
        return lineage.described(pairs)


def candidates(folder: Path, fits: Fits | None = None) -> Candidates:
    """What a resume may take of the run in ``folder``; of equal steps, one that ``fits`` first."""
    checkpoints = Run(folder).checkpoints()
    own = members(checkpoints)
    others = [c for c in checkpoints if c.committed and c not in own]

    def rank(checkpoint: Checkpoint) -> tuple[Any, ...]:
        step, *rest = by_step(checkpoint)
        held = checkpoint.manifest
        return step, fits is None or held is None or fits(held), *rest

    usable = [c for c in checkpoints if c not in others]
    return Candidates(folder, tuple(sorted(usable, key=rank, reverse=True)), tuple(others))
