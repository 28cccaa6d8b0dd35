"""The checkpoints that are damaged, and what of theirs can be mixed up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from hardening.corruption.damage import Damage, foreign, missing, swapped

FIXTURES = Path(__file__).parents[4] / "fixtures"


@dataclass(frozen=True, slots=True)
class Subject:
    """A fixture, and others of the same model: another step or run (``twin``), more ranks."""

    name: str
    root: str = "."
    twin: str | None = None
    larger: str | None = None

    def copied(self, work: Path) -> Path:
        """A copy of the checkpoint; what holds the expected values is left out."""
        folder = work / self.name
        shutil.copytree(FIXTURES / self.name / self.root, folder)
        for name in ("live.safetensors", "gen.json"):
            (folder / name).unlink(missing_ok=True)
        return folder


SUBJECTS = (
    Subject("zero0-bf16"),  # one file: that of another save is another checkpoint, and a whole one
    Subject("zero0-fp32"),
    Subject("zero1-fp16-w2", twin="zero1-bf16-w2", larger="zero1-fp16-w4"),
    Subject("zero1-bf16-w3", twin="zero2-bf16-w3", larger="zero1-bf16-w4"),
    Subject("zero2-bf16-w2", twin="zero2-bf16-w3", larger="zero2-bf16-w4"),
    Subject("zero2-fp32-w2", twin="zero2-bf16-w2", larger="zero2-fp32-w3"),
    Subject("zero2-exclude-frozen", twin="zero2-bf16-w2"),
    Subject("zero2-legacy", twin="zero2-bf16-w2"),
    Subject("zero3-bf16-w2", twin="zero3-fp16-w2", larger="zero3-bf16-w4"),
    Subject("zero3-fp16-w3", twin="zero3-bf16-w3", larger="zero3-fp16-w4"),
    Subject("zero3-subgroups", twin="zero3-bf16-w2"),
    Subject("trainer-zero2", "checkpoint-2", twin="zero2-bf16-w2"),
    Subject("trainer-zero3", "checkpoint-2", twin="zero3-bf16-w2"),
    Subject("parallel/tp_qwen3_frozen_z2_w4", twin="zero2-bf16-w2"),
    Subject("parallel/tp_fusedb_z3_w4", twin="zero3-bf16-w2"),
    Subject("parallel/mics_hier_w4", twin="zero3-bf16-w2"),
    Subject("parallel/p3dm_z1_w4", twin="parallel/mpu_z1_nested_w4"),
    Subject("parallel/aeptp_mixtral_z2_w4", twin="pipelines-and-experts/autoep-zero2"),
    Subject("pipelines-and-experts/pipeline-zero1", twin="parallel/p3dm_z1_w4"),
    Subject("pipelines-and-experts/moe-zero2-sizes", twin="pipelines-and-experts/autoep-zero2"),
    Subject("pipelines-and-experts/autoep-zero3", twin="pipelines-and-experts/autoep-zero3-tensor"),
)


def files(folder: Path) -> list[Path]:
    """The files of a checkpoint that a conversion reads."""
    found = sorted(folder.rglob("*_states.pt*"))
    beside = ("latest", "model.safetensors", "config.json")
    return [*found, *(folder / name for name in beside if (folder / name).is_file())]


def mixtures(subject: Subject, folder: Path) -> Iterator[Damage]:
    """Files swapped, missing, and taken from other saves."""
    found = sorted(folder.rglob("*_states.pt*"))
    for kind in ("optim_states", "model_states"):
        ranks = [path for path in found if kind in path.name and "zero_pp" in path.name]
        for one, other in combinations(ranks, 2):
            yield swapped(one, other)
            yield foreign(one, other, f"is a copy of {other.name}")
    yield from map(missing, found)
    for name in (subject.twin, subject.larger):
        if name is None:
            continue
        for source in sorted((FIXTURES / name).rglob("*_states.pt*")):
            goals = [path for path in found if path.name.rpartition("zero_pp")[2] in source.name]
            for path in goals or ():
                yield foreign(path, source, f"of {name}")
            if not (found[0].parent / source.name).exists():
                yield foreign(found[0].parent / source.name, source, f"of {name}, one more")
