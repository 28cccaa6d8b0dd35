"""What rank 0 offers to go on from: the checkpoints of a run, the newest first, whoever wrote them.

A committed one is known to be whole. One that was written without ckpt has to prove it, and, if a
committed one is there too, that it goes on from that one; else the resume stops, and names both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckpt.runs import completeness, lineage, liveness
from ckpt.runs import manifest as manifests
from ckpt.runs.completeness import Proof
from ckpt.runs.manifest import Manifest
from ckpt.runs.overwriting import require_one_save
from ckpt.runs.run import Checkpoint, members, open_checkpoint, order, require_read, step_in
from ckpt.runs.succession import relate
from ckpt.runs.verify import verify
from converters.errors import CheckpointError

Fits = Callable[[Manifest], bool]  # whether it was saved by as many ranks, and in the same stage
Sort = Literal["weights", "lost", "apart"]


@dataclass(frozen=True, slots=True)
class Offer:
    """A checkpoint that a training can go on from; ``proof`` if it was written without ckpt."""

    checkpoint: Checkpoint
    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint that was not offered. ``sort``: weights alone, lost work, or of no concern."""

    path: Path
    why: str
    sort: Sort


def candidate(path: Path) -> Checkpoint:
    """What a path in a run is: a folder, or a file of Lightning."""
    if path.is_file():
        return Checkpoint(path, step_in(path.name), None, manifests.ABSENT, False)
    return open_checkpoint(path)


def newest_first(found: Sequence[Checkpoint], fits: Fits | None = None) -> list[Checkpoint]:
    """The order in which they are offered: by step; of one step what fits, then what is committed.

    One whose step nobody says counts as newer than all if it was written later than all that are
    committed. Where there is such a one and none is committed, they go by their times.
    """
    latest = max((c.manifest.created for c in found if c.manifest), default=0.0)
    steps = {c.folder: c.step if c.manifest else _step(c) for c in found}
    by_time = not latest and None in steps.values()

    def rank(checkpoint: Checkpoint) -> tuple[Any, ...]:
        held, step = checkpoint.manifest, steps[checkpoint.folder]
        if held is not None:
            at, *rest = order(checkpoint)
            return at, fits is None or fits(held), True, *rest
        time = liveness.written(checkpoint.folder)
        if step is None:
            unknown = math.inf if time > latest else -1
            return time if by_time else unknown, fits is None, False, time, checkpoint.name
        return time if by_time else step, fits is None, False, time, checkpoint.name

    return sorted(found, key=rank, reverse=True)


def _step(checkpoint: Checkpoint) -> int | None:
    """The step of one without a manifest, by its name or by what it holds."""
    return (
        checkpoint.step if checkpoint.step is not None else completeness.step_of(checkpoint.folder)
    )


class Offers:
    """The checkpoints of a run that can be gone on from; ``passed`` are the others, each said.

    ``deepspeed`` is whether DeepSpeed is to load it, which is said to be impossible for others.
    """

    def __init__(self, run: Path, fits: Fits | None = None, deepspeed: bool = True):
        self.run, self.deepspeed = run, deepspeed
        present = [c for path in completeness.candidates(run) if (c := _there(path)) is not None]
        own = members(present)
        self.others = [c for c in present if c.committed and c not in own]  # of other lines
        self.found = newest_first([c for c in present if c not in self.others], fits)
        self.passed: list[PassedOver] = []
        self.reasons: dict[Path, str | None] = {}  # why a committed one is unusable

    def __iter__(self) -> Iterator[Offer]:
        self._tell_others()
        yield from self._of_the_line()
        usable = [c for c in self.others if self._why(c) is None]
        if usable:
            raise CheckpointError(
                f"{self.run}: nothing of the run that saved last can be resumed from, but there is "
                f"{self._described()}: pass {usable[-1].folder} to go on from that, or name "
                "another folder to start anew",
                "incomplete",
            )

    def _tell_others(self) -> None:
        """Says on stderr whose checkpoints are taken, where there are those of several lines."""
        if not self.others:
            return
        run = next((c.manifest.run for c in self.found if c.manifest), None)
        if all(c.manifest is not None and c.manifest.run == run for c in self.others):
            what = f"has gone back from {self._described()}"
        else:
            what = f"saved last and goes on; there is also {self._described()}"
        print(
            f"ckpt: {self.run}: {lineage.shown(run)} {what}, which a resume takes only by name",
            file=sys.stderr,
            flush=True,
        )

    def _described(self) -> str:
        pairs = [(c.name, c.manifest.run if c.manifest else None) for c in self.others]
        return lineage.described(pairs)

    def _of_the_line(self) -> Iterator[Offer]:
        reached = False  # the newest committed one that can be used
        for checkpoint in self.found:
            if checkpoint.why != manifests.ABSENT:
                why = self._why(checkpoint)
                if why is None:
                    reached = True
                    yield Offer(checkpoint)
                else:
                    only = checkpoint.tier == "weights"
                    self.pass_over(checkpoint.folder, why, "weights" if only else "lost")
                continue
            proof = self._proven(checkpoint)
            if proof is not None and (reached or self._succeeds(proof)):
                yield Offer(checkpoint, proof)

    def pass_over(self, path: Path, why: str, sort: Sort = "lost") -> None:
        """Notes and says why a checkpoint is not taken."""
        self.passed.append(PassedOver(path, why, sort))
        print(f"ckpt: passed over {path}: {why}", file=sys.stderr, flush=True)

    def require_none_lost(self) -> None:
        """``CheckpointError`` if a training has been here whose work a fresh start would forget.

        Weights alone are none: no training could go on from them.
        """
        lost = [passed for passed in self.passed if passed.sort != "weights"]
        if lost:
            shown = "; ".join(f"{passed.path}: {passed.why}" for passed in lost[:3])
            more = f" (and {len(lost) - 3} more)" if len(lost) > 3 else ""
            raise CheckpointError(
                f"{self.run} has checkpoints, but none that can be resumed from ({shown}{more}); "
                f"bring back what is missing (ckpt doctor {self.run} helps), or move them away to "
                "begin anew",
                "incomplete",
            )
        if self.passed:
            newest = self.passed[0].path
            print(
                f"ckpt: {self.run} holds weights only, nothing to resume from: the training begins "
                f"at step 0; to begin with these weights, make the model from {newest} "
                "(from_pretrained)",
                file=sys.stderr,
                flush=True,
            )

    def _why(self, checkpoint: Checkpoint) -> str | None:
        if checkpoint.folder not in self.reasons:
            self.reasons[checkpoint.folder] = unusable(checkpoint)
        return self.reasons[checkpoint.folder]

    def _proven(self, checkpoint: Checkpoint) -> Proof | None:
        """What one without a manifest proves to be; ``None``: not whole, or weights alone."""
        path = checkpoint.folder
        try:
            proof = liveness.prove_at_rest(path)
            if path.is_dir():
                require_one_save(path)
        except CheckpointError as error:
            require_read(error)
            if error.kind == "refused" and "right now" in str(error):
                raise
            why = str(error).removeprefix(f"{path} ").removeprefix(f"{path}/")
            self.pass_over(path, f"no manifest.json, and not whole: {why}")
            return None
        if not proof.resumable:
            self.pass_over(path, WEIGHTS_ONLY, "weights")
            return None
        return proof

    def _succeeds(self, proof: Proof) -> bool:
        """Whether it goes before all committed ones; ``CheckpointError`` if nobody knows."""
        path = proof.path
        base = next((c for c in self.found if c.manifest and self._why(c) is None), None)
        if base is not None:
            relation = relate(base, proof)
            if relation.relation == "apart":
                self.pass_over(path, relation.why, "apart")
                return False
            if relation.relation == "other":
                raise CheckpointError(
                    f"{path} is whole and of a later step than {base.folder}, but {relation.why}: "
                    f"it is of another training; move it out of {self.run}, or name the one to go "
                    f"on from, {base.folder} or {path}",
                    "refused",
                )
        if self.deepspeed:
            require_deepspeed(proof, base)
        return True


WEIGHTS_ONLY = "weights only; training cannot go on from it"


def _there(path: Path) -> Checkpoint | None:
    try:
        return candidate(path)
    except CheckpointError:
        if path.exists():
            raise
        return None  # it was deleted while we looked


def unusable(checkpoint: Checkpoint) -> str | None:
    """Why training cannot go on from a committed one; ``None`` if it can."""
    if checkpoint.unusable is not None:
        return checkpoint.unusable
    try:
        return verify(checkpoint).hindrance
    except CheckpointError as error:
        return str(error)


def require_deepspeed(proof: Proof, base: Checkpoint | None = None) -> None:
    """``CheckpointError`` for a checkpoint that DeepSpeed cannot load."""
    if proof.tag is None:
        other = f", such as {base.folder}" if base is not None else ""
        raise CheckpointError(
            f"{proof.path} is a whole checkpoint, written by {proof.kind}, which DeepSpeed cannot "
            f"load; go on with that trainer, or name the checkpoint to go on from{other}",
            "unsupported",
        )
