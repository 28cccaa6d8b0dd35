"""A manifest for a checkpoint that was written without ckpt, if it proves to be whole.

Nobody said that its save finished, so everything that can be checked is: that it is whole by what
its writer writes (``completeness``) and does not change meanwhile (``liveness``), and that every
record of a torch zip has its CRC32.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from ckpt import __version__
from ckpt.runs import completeness, intact, liveness, manifest, succession
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint, Run, open_checkpoint
from converters import files, zero
from converters.errors import CheckpointError


def adopt(run: Run) -> list[tuple[Checkpoint, str | None]]:
    """Commits what is whole; returns every checkpoint without a manifest and why it was not."""
    found: list[tuple[Checkpoint, str | None]] = []
    for checkpoint in run.checkpoints():
        if checkpoint.manifest is not None or not _may_be_given(checkpoint):
            continue
        try:
            commit(checkpoint.folder)
            found.append((open_checkpoint(checkpoint.folder), None))
        except CheckpointError as error:
            found.append((checkpoint, str(error)))
    return found


def _may_be_given(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint may get a manifest: it has none, or one that is damaged."""
    if checkpoint.why == manifest.ABSENT:
        return True
    try:
        manifest.read(checkpoint.folder)
    except CheckpointError as error:
        return error.kind == "corrupt"  # not one of a newer ckpt
    return False


def commit(folder: Path, data: bool = True) -> Manifest:
    """Gives a whole checkpoint its manifest, durably; ``CheckpointError`` if it is not whole.

    Without ``data`` the records of torch zips are not read: a later ``verify --data`` compares them
    with the CRC32s that they had when they were saved.
    """
    proof = liveness.prove_at_rest(folder)
    if proof.tag is None:
        raise CheckpointError(
            f"{folder} is whole, written by {proof.kind}; a manifest is for what DeepSpeed wrote. "
            "ckpt.find takes it as it is",
            "unsupported",
        )
    source = zero.read(folder)
    if source.place.root != folder:
        raise CheckpointError(f"{folder} is the folder of a tag; commit the one above", "refused")
    state = completeness.trainer_state(folder) if proof.history is not None else {}
    if proof.step is None:
        raise CheckpointError(f"{folder} does not say of which step it is", "incomplete")
    names = _names(folder)
    for name in names:
        intact.require_file(folder / name)
    line = succession.line_after(folder, proof.step)
    held = Manifest(
        step=proof.step,
        tag=source.place.tag,
        tier="full",
        save=uuid.uuid4().hex,
        created=max((folder / name).stat().st_mtime for name in names),
        stage=source.stage,
        world_size=source.world_size,
        versions={"ckpt": __version__} | ({"deepspeed": source.version} if source.version else {}),
        metrics=_metrics(state),
        files={name: manifest.digest(folder / name) for name in names},
        run=line.run if line else None,
        line=line.at(proof.step) if line else (),
        name=folder.name,
    )
    if wrong := manifest.check(folder, held, data):
        raise CheckpointError(f"{folder} is damaged: {wrong[0]}")
    _sync(folder, names)
    files.write_file(folder / manifest.NAME, held.dumps())
    files.sync_folder(folder)
    return held


def _names(folder: Path) -> list[str]:
    """Every file but hidden ones, temporary ones and those of the tool."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
        and not name.endswith(".partial")
    ]


def _metrics(state: dict[str, Any]) -> dict[str, float]:
    """What the Trainer's evaluation at this very step logged."""
    found: dict[str, float] = {}
    log = state.get("log_history")
    for entry in log if isinstance(log, list) else ():
        if isinstance(entry, dict) and entry.get("step") == state.get("global_step"):
            numbers = {n: v for n, v in entry.items() if isinstance(v, (int, float))}
            found |= {n: float(v) for n, v in numbers.items() if n.startswith("eval_")}
    return found


def _sync(folder: Path, names: list[str]) -> None:
    """Makes files durable that were written without an fsync."""
    for name in names:
        files.sync_file(folder / name)
    for inner, _, _ in os.walk(folder):
        files.sync_folder(Path(inner))
