"""What a manifest says of a save that ckpt did not make: of which step it is, and how many
ranks saved it.

DeepSpeed's files say so themselves. Other trainers write files of each rank beside the
states, and torch's distributed checkpoints those of the ranks that had something to write.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.runs.foreign import dcp_files
from ckpt.runs.foreign.proofs import Proof
from ckpt.runs.run import step_in
from converters import detect
from converters.detect.filenames import DCP
from converters.errors import CheckpointError
from converters.source import Source
from converters.words import shell_word

_OF_EACH_RANK = ("rng_state_*.pth", "random_states_*.pkl", "optimizer_0_rank*.bin")


@dataclass(frozen=True, slots=True)
class SavedFacts:
    """The facts of one save; ``source`` is what DeepSpeed saved, ``None`` for all others."""

    step: int
    world_size: int
    tag: str | None = None
    stage: int | None = None
    deepspeed: str | None = None
    source: Source | None = None


def facts_of(proof: Proof) -> SavedFacts:
    """The facts of a whole checkpoint; ``CheckpointError`` where nothing says its step, and for
    the folder of a tag."""
    folder = proof.path
    if proof.tag is None:
        step, world_size = _step_without_deepspeed(proof), _ranks_without_deepspeed(folder)
        return SavedFacts(_stated(folder, step), world_size)

    source = detect.read(folder, complete=True)
    if source.place.root != folder:
        raise CheckpointError(
            f"{folder} is the folder of a tag; commit the one above: ckpt doctor "
            f"{shell_word(folder.absolute().parent.parent)} --adopt",
            "refused",
        )
    tag, ranks, stage = source.place.tag, source.world_size, source.stage
    return SavedFacts(_stated(folder, proof.step), ranks, tag, stage, source.version, source)


def _stated(folder: Path, step: int | None) -> int:
    if step is None:
        raise CheckpointError(f"{folder} does not say of which step it is", "incomplete")
    return step


def _step_without_deepspeed(proof: Proof) -> int | None:
    """The step that the files or, if none does, the name of the folder says."""
    step = proof.step
    if step is None and (proof.path / DCP).is_file():
        step = detect.read(proof.path, complete=True).step
    return step_in(proof.path.name) if step is None else step


def _ranks_without_deepspeed(folder: Path) -> int:
    """The ranks that have written files of their own; 1 where none has."""
    counts = [len(list(folder.glob(pattern))) for pattern in _OF_EACH_RANK]
    parts = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return max(1, *counts, dcp_files.rank_count(parts))
