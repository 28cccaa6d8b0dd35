"""The proof of a checkpoint without a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.source import Source

MODEL = "model"  # in place of a writer: weights of which nobody says who wrote them
OWN = "ckpt"  # the writer of what ckpt made of a checkpoint without a manifest
PLAIN_DEEPSPEED = "DeepSpeed"  # the writer of a tag that no trainer describes
STATES_ALONE = (PLAIN_DEEPSPEED, "FSDP")  # the writers of states that no trainer describes
# The writers without DeepSpeed whose checkpoints the front ends of ckpt commit, too.
COMMITTED_WITHOUT_DEEPSPEED = (
    "the Trainer with FSDP",
    "the Trainer without DeepSpeed",
    "Accelerate with FSDP",
    "Accelerate without DeepSpeed",
    "FSDP",
    "torch's distributed checkpoint",
)
History = tuple[Mapping[str, Any], ...]


def shapes_of(source: Source) -> Mapping[str, tuple[int, ...]] | None:
    """The shape of each tensor by its name; ``None`` if there are none."""
    shapes = {name: tuple(ref.shape) for name, ref in source.weights.tensors.items()}
    return shapes or None


@dataclass(frozen=True, slots=True)
class Proof:
    """The proof of a whole checkpoint. ``resumable``: whether it is more than weights.

    ``kind`` says who wrote it, ``tag`` is set for what DeepSpeed can load, ``step`` is
    ``None`` where the files do not say. ``history`` is what the Trainer logged until
    then. ``hindrance`` says why no training goes on from states as they lie there.
    ``source`` is what was read of DeepSpeed's files, while it is being proven.
    ``remark`` is a line on what may be missing, and need not be.
    """

    path: Path
    kind: str
    step: int | None = None
    tag: str | None = None
    resumable: bool = True
    history: History | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    hindrance: str | None = None
    source: Source | None = None
    remark: str | None = None

    @property
    def gets_manifest(self) -> bool:
        """Whether ``ckpt doctor --adopt`` commits such a checkpoint, in a folder of its own.

        Of DeepSpeed's parallelism that is not read here nothing says which shapes there are.
        """
        if self.hindrance is not None or not self.path.is_dir():
            return False
        if self.tag is not None:
            return self.shapes is not None
        return self.resumable and self.kind in COMMITTED_WITHOUT_DEEPSPEED
