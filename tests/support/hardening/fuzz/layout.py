"""State files with random edits, in a checkpoint that is otherwise whole."""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

from hardening.fuzz.mutation import edited
from hardening.fuzz.targets import FIXTURES, checkpoint, fails

NAMES = ("zero0-bf16", "zero0-fp16", "zero1-fp16-w2", "zero2-bf16-w2", "zero3-bf16-w2")


class Layout:
    """A copy of a checkpoint, one of whose state files is edited and saved by torch."""

    def __init__(self, name: str, work: Path):
        import torch

        self.folder = work / name
        shutil.copytree(FIXTURES / name, self.folder)
        self.paths = sorted(self.folder.rglob("*_states.pt"))
        self.states: dict[Path, Any] = {
            path: torch.load(path, weights_only=False) for path in self.paths
        }

    def tried(self, seed: int) -> str | None:
        """What went wrong with the edits of a seed; ``None`` for weights or a proper error."""
        import torch

        rng = random.Random(seed)
        path = rng.choice(self.paths)
        real = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.save(edited(copy.deepcopy(self.states[path]), rng), path)
        except Exception:  # torch cannot save it, so there is no such file
            path.write_bytes(real)
            return None
        try:
            return fails(lambda _: checkpoint(self.folder), b"")
        finally:
            path.write_bytes(real)
