"""Whether a checkpoint that was written without ckpt goes on from a committed one.

A week of training with the stock Trainer between two with ckpt leaves whole checkpoints
of higher steps. They are the newest of this training, unless they show that they belong
to another: what the Trainer logged until the committed one stands at the beginning of
what it had logged then, and the parameters are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt.runs import lineage
from ckpt.runs.foreign import completeness, histories, liveness
from ckpt.runs.foreign.proofs import PLAIN_DEEPSPEED, Proof
from ckpt.runs.lineage import Line
from ckpt.runs.run import Run, RunCheckpoint, is_run, members
from converters import detect, words
from converters.errors import CheckpointError

Relation = Literal["follows", "apart", "other"]


@dataclass(frozen=True, slots=True)
class Succession:
    """How a checkpoint relates to the newest committed one,
    and why, as words after its name."""

    relation: Relation
    why: str = ""


def relate(committed: RunCheckpoint, proof: Proof) -> Succession:
    """How a whole checkpoint of a later step,
    written without ckpt, relates to ``committed``.

    "other": it contradicts it; "apart": it does not, but cannot go on from it, as it
    was written before; else it "follows".
    """
    assert committed.manifest is not None
    folder = committed.folder
    committed_history = histories.of_folder(folder)
    is_engine_alone = proof.history is None and proof.kind == PLAIN_DEEPSPEED
    if committed_history is not None and is_engine_alone:
        reason = (
            "is a state of the engine alone (of trainer.save_model()), "
            f"without {completeness.STATE}"
        )
        return Succession("apart", reason)

    if proof.history is not None and (proof.step or 0) <= committed.manifest.step:
        reason = (
            f"has no manifest.json, and is of step {proof.step} whatever its name says: "
            f"no later than {folder}"
        )
        return Succession("apart", reason)

    # which says nothing about when it was saved
    is_derived = committed.manifest.is_derived
    if not is_derived and liveness.written(proof.path) < committed.manifest.created:
        reason = f"was written before {folder} was committed, so it does not go on from it"
        return Succession("apart", reason)

    if (difference := histories.difference(committed_history, proof.history)) is not None:
        return Succession("other", f"has logged something else than {folder} {difference}")

    shape_difference = _shapes_differ(committed, proof)
    if shape_difference is not None:
        return Succession("other", shape_difference)
    return Succession("follows")


def line_after(folder: Path, step: int, excluded_line: Line | None = None) -> Line | None:
    """The line that goes on through a checkpoint of ``step`` written without ckpt.

    That is the line beside it that saved last and that its log does not contradict; a
    new one where it contradicts all of them. ``excluded_line`` is one that it does not
    go on from. ``None`` if no committed one is older, by its step and by its time, or
    that one has no ids: then both are of one line without a name. Where a later step is
    committed, it joins the line of the older one, and nothing is given up for it: a copy
    that somebody made of an older checkpoint is no training that went back.
    """
    # DeepSpeed saves into the run itself
    run_of_folder = Run(folder if is_run(folder) else folder.parent)
    candidates = [
        checkpoint
        for checkpoint in run_of_folder.checkpoints()
        if checkpoint.manifest and not checkpoint.manifest.is_derived
    ]
    if excluded_line is not None:
        candidates = _without(candidates, excluded_line)

    is_new = excluded_line is not None
    history = histories.of_folder(folder)
    while (line := _current(candidates)) is not None:
        line_members = members(candidates, line)
        if line_members:
            newest_history = histories.of_folder(line_members[-1].folder)
            if histories.contradiction(newest_history, history) is None:
                through = _line_through(folder, step, line_members)
                # without a name it would be one with those that it contradicts
                return line if is_new and through is None and line.run else through
            is_new = True
        candidates = _without(candidates, line)

    return Line.begin() if is_new else None


def _current(checkpoints: Sequence[RunCheckpoint]) -> Line | None:
    """The line that saved last among these; also a damaged one tells."""
    return lineage.current(entry.manifest for entry in checkpoints if entry.manifest)


def _without(checkpoints: Sequence[RunCheckpoint], line: Line) -> list[RunCheckpoint]:
    """Those that are not of a line."""
    return [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.manifest and not line.has(checkpoint.manifest)
    ]


def _line_through(folder: Path, step: int, line_members: Sequence[RunCheckpoint]) -> Line | None:
    """The line of a checkpoint that contradicts no member of one; as ``line_after``."""
    earlier_members = [member for member in line_members if (member.step or 0) <= step]
    base_manifest = earlier_members[-1].manifest if earlier_members else None
    if base_manifest is None or liveness.written(folder) < base_manifest.created:
        return None
    if base_manifest.run is None:
        return None
    if len(earlier_members) < len(line_members):
        return Line.of(base_manifest)

    return Line.go_on(base_manifest, base_manifest.step)


def _shapes_differ(committed: RunCheckpoint, proof: Proof) -> str | None:
    if proof.shapes is None:
        return None

    assert committed.manifest is not None
    try:
        source = detect.read(committed.folder, committed.manifest.tag, complete=True)
    except CheckpointError:
        return None

    shapes = {name: tuple(ref.shape) for name, ref in source.weights.tensors.items()}
    common_names = sorted(shapes.keys() & proof.shapes.keys())
    if not common_names:
        return f"has none of the parameters of {committed.folder}"

    for name in common_names:  # frozen ones may be left out of either
        if shapes[name] != proof.shapes[name]:
            return (
                f"has other parameters than {committed.folder}: {name} is "
                f"{words.shape(proof.shapes[name])}, there {words.shape(shapes[name])}"
            )

    return None
