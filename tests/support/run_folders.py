"""Runs for tests: folders of real checkpoints, committed as the saver commits them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from oracles import FIXTURES

from ckpt.folders import filenames
from ckpt.runs import manifest
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import RunCheckpoint, open_checkpoint

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"


def listed(folder: Path) -> dict[str, manifest.FileRecord]:
    """Every file of a folder with its digest, as a manifest lists them."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    own = (filenames.MANIFEST, filenames.PINNED)
    return {name: manifest.digest(folder / name) for name in names if name not in own}


def commit(
    folder: Path,
    step: int,
    metrics: Mapping[str, float] | None = None,
    tier: str = "full",
    tag: str | None = "global_step2",
    node: int = 0,
    nodes: int = 1,
    save: str | None = None,
) -> RunCheckpoint:
    """Gives the folder its manifest."""
    held = Manifest(
        step=step,
        tag=tag if tier == "full" else None,
        tier=tier,
        save=save or uuid4().hex,
        created=1_000_000.0 + step,
        stage=2,
        world_size=2,
        node=node,
        nodes=nodes,
        versions={"ckpt": "0.1.0"},
        metrics=metrics or {},
        files=listed(folder),
    )
    (folder / filenames.MANIFEST).write_bytes(held.dumps())
    return open_checkpoint(folder)


def real(run: Path, step: int, metrics: Mapping[str, float] | None = None) -> RunCheckpoint:
    """A committed copy of a Trainer's checkpoint of two ranks, ZeRO-2, with 16-bit weights."""
    folder = run / f"checkpoint-{step}"
    shutil.copytree(SOURCE, folder)
    return commit(folder, step, metrics)


def small(
    run: Path, step: int, metrics: Mapping[str, float] | None = None, tier: str = "full"
) -> RunCheckpoint:
    """A committed folder of a few bytes, for what does not look into the files."""
    folder = run / f"checkpoint-{step}"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(40))
    if tier == "full":
        (folder / "global_step2/mp_rank_00_model_states.pt").write_bytes(os.urandom(60))
        (folder / "latest").write_text("global_step2")
    return commit(folder, step, metrics, tier)
