"""Whether a checkpoint is whole: by its manifest, and by what its state files say themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.runs import engines, locks, manifest
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.run import Checkpoint, Run, is_checkpoint, is_run, open_checkpoint, spelt
from converters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. ``problems`` has a line for each thing that is not whole.

    ``proven`` are lines on what is; ``data`` is whether every byte was read.
    """

    checkpoint: Checkpoint
    problems: tuple[str, ...]
    proven: tuple[str, ...]
    data: bool

    @property
    def whole(self) -> bool:
        """Whether the checkpoint is committed and nothing is wrong with it."""
        return not self.problems

    @property
    def hindrance(self) -> str | None:
        """The first problem that a resume minds: not weights that were deleted by hand."""
        spared = () if self.checkpoint.lacks is None else self.checkpoint.deleted
        lines = {f"{name}: missing" for name in spared}
        return next((line for line in self.problems if line not in lines), None)

    def facts(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {
            "folder": str(self.checkpoint.folder),
            "step": self.checkpoint.step,
            "committed": self.checkpoint.committed,
            "whole": self.whole,
            "checked": "data" if self.data else "structure",
            "problems": list(self.problems),
            "proven": list(self.proven),
        }


def chosen(path: Path) -> list[Checkpoint]:
    """The checkpoint that ``path`` is, or those of the run that it is.

    ``CheckpointError`` if it is no folder.
    """
    path = spelt(path)
    if path.is_dir() and is_checkpoint(path) and not is_run(path):
        return [open_checkpoint(path)]
    return Run(path).checkpoints()


def verify(checkpoint: Checkpoint, data: bool = False, progress: Progress = quiet) -> Verdict:
    """Checks every file's size, or with ``data`` every byte, and that the state files fit together.

    Of a checkpoint without a manifest only the latter, and it never counts as whole.
    """
    held = checkpoint.manifest
    if held is None:
        said, wrong = states(checkpoint.folder)
        problems = [str(checkpoint.why), *([wrong] if wrong else [])]
        return Verdict(checkpoint, tuple(problems), (said,) if said else (), False)
    with locks.reading(checkpoint.folder):
        problems = manifest.check(checkpoint.folder, held, data, progress)
        proven = []
        if not problems:
            what = "every byte has its digest" if data else "every file has its size"
            proven = [f"{len(held.files)} files, {what}"]
        if checkpoint.lacks is not None:
            proven.append("what was deleted is needed by no resume; ckpt doctor RUN --fix")
        if held.tier == "full" and held.nodes == 1:
            for name, tag in engines.tags(held).items():
                said, wrong = states(checkpoint.folder, tag)
                proven += [f"{name}: {said}" if name else said] if said else []
                problems += [wrong] if wrong else []
    if held.nodes > 1:
        proven.append(f"the part of node {held.node} of {held.nodes}; ckpt collect joins them")
    return Verdict(checkpoint, tuple(problems), tuple(proven), data)


def states(folder: Path, tag: str | None = None) -> tuple[str | None, str | None]:
    """What the headers of DeepSpeed's files prove, and what is wrong with them, as lines.

    What is not read here, such as pipeline parallelism, is said and counts as no fault.
    """
    from converters import zero

    try:
        found = zero.read(folder, tag)
    except CheckpointError as error:
        if error.kind == "unsupported":
            return f"state files not checked: {error}", None
        return None, str(error)
    ranks = f"{found.world_size} ranks" if found.world_size != 1 else "1 rank"
    what = f"ZeRO stage {found.stage}" if found.stage else "no ZeRO"
    return f"state files complete: {what}, {ranks}, {len(found.weights.tensors)} tensors", None
