"""Whether a checkpoint that was written without ckpt goes on from a committed one.

A week of training with the stock Trainer between two with ckpt leaves whole checkpoints of higher
steps. They are the newest of this training, unless they show that they belong to another: what the
Trainer logged until the committed one stands at the beginning of what it had logged then, and the
parameters are the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt.runs import completeness, liveness
from ckpt.runs.completeness import History, Proof
from ckpt.runs.lineage import Line
from ckpt.runs.run import Checkpoint, Run, is_run, members
from converters import zero
from converters.errors import CheckpointError

Relation = Literal["follows", "apart", "other"]


@dataclass(frozen=True, slots=True)
class Succession:
    """How a checkpoint relates to the newest committed one, and why, as words after its name."""

    relation: Relation
    why: str = ""


def relate(committed: Checkpoint, proof: Proof) -> Succession:
    """How a whole checkpoint of a later step, written without ckpt, relates to ``committed``.

    "other": it contradicts it; "apart": it does not, but cannot go on from it, as it was written
    before; else it "follows".
    """
    assert committed.manifest is not None
    folder = committed.folder
    try:
        before = completeness.history_of(folder)
    except CheckpointError:
        before = None
    if before is not None and proof.history is None and proof.kind == "DeepSpeed":
        why = f"is a state of the engine alone (of trainer.save_model()): no {completeness.STATE}"
        return Succession("apart", why)
    if proof.history is not None and (proof.step or 0) <= committed.manifest.step:
        why = f"no manifest.json, and of step {proof.step} whatever its name says: no later than "
        return Succession("apart", f"{why}{folder}")
    resharded = committed.manifest.made_of is not None  # which says nothing about when it was saved
    if not resharded and liveness.written(proof.path) < committed.manifest.created:
        why = f"was written before {folder} was committed, so it does not go on from it"
        return Succession("apart", why)
    differs = _history_differs(folder, before, proof) or _shapes_differ(committed, proof)
    return Succession("follows") if differs is None else Succession("other", differs)


def line_after(folder: Path, step: int) -> Line | None:
    """The line that goes on through a checkpoint of ``step`` written without ckpt.

    ``None`` if no committed one beside it is older, by its step and by its time.
    """
    run = Run(folder if is_run(folder) else folder.parent)  # DeepSpeed saves into the run itself
    saved = [c for c in members(run.checkpoints()) if c.manifest and c.manifest.made_of is None]
    before = [c for c in saved if (c.step or 0) <= step]
    base = before[-1].manifest if before else None
    if base is None or liveness.written(folder) < base.created:
        return None
    return Line.go_on(base, base.step)


def _history_differs(folder: Path, before: History | None, proof: Proof) -> str | None:
    if before is None or proof.history is None:
        return None
    for index, entry in enumerate(before):
        after = proof.history[index] if index < len(proof.history) else None
        if json.dumps(after, sort_keys=True) != json.dumps(entry, sort_keys=True):  # NaN is NaN
            return f"has logged something else than {folder} at step {entry.get('step')}"
    return None


def _shapes_differ(committed: Checkpoint, proof: Proof) -> str | None:
    if proof.shapes is None:
        return None
    assert committed.manifest is not None
    try:
        source = zero.read(committed.folder, committed.manifest.tag)
    except CheckpointError:
        return None
    shapes = {name: tuple(ref.shape) for name, ref in source.weights.tensors.items()}
    common = sorted(shapes.keys() & proof.shapes.keys())
    if not common:
        return f"has none of the parameters of {committed.folder}"
    for name in common:  # frozen ones may be left out of either
        if shapes[name] != proof.shapes[name]:
            return (
                f"has other parameters than {committed.folder}: {name} is "
                f"{list(proof.shapes[name])}, there {list(shapes[name])}"
            )
    return None
