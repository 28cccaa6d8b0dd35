"""A manifest for a checkpoint that was written without ckpt, if it proves to be whole.

Nobody said that its save finished, so everything that can be checked is: the state files fit
together (``zero.read``), every record of a torch zip has its CRC32, safetensors headers cover their
files, and of a Trainer's, ``trainer_state.json`` is complete and every rank has its RNG state.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ckpt import __version__
from ckpt.runs import doctor, manifest
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint, Run, open_checkpoint
from converters import files, safetensors, torchzip, zero
from converters.errors import CheckpointError

_TRAINER = ("trainer_state.json", "training_args.bin", "rng_state.pth", "rng_state_0.pth")
_BINS = ("training_args", "pytorch_model", "adapter_model", "scheduler", "optimizer")


def adopt(run: Run) -> list[tuple[Checkpoint, str | None]]:
    """Commits what is whole; returns every checkpoint without a manifest and why it was not."""
    found: list[tuple[Checkpoint, str | None]] = []
    for checkpoint in run.checkpoints():
        if checkpoint.manifest is not None or checkpoint.why != manifest.ABSENT:
            continue
        try:
            commit(checkpoint.folder)
            found.append((open_checkpoint(checkpoint.folder), None))
        except CheckpointError as error:
            found.append((checkpoint, str(error)))
    return found


def commit(folder: Path) -> Manifest:
    """Gives a whole checkpoint its manifest, durably; ``CheckpointError`` if it is not whole."""
    source = zero.read(folder)
    if source.place.root != folder:
        raise CheckpointError(f"{folder} is the folder of a tag; commit the one above", "refused")
    if doctor.changed_lately(folder):
        raise CheckpointError(
            f"{folder} changed in the last ten minutes, so a save may not be done; try again later",
            "refused",
        )
    state = _trainer_state(folder, source) if _is_a_trainers(folder) else {}
    if source.step is None and "global_step" not in state:
        raise CheckpointError(f"{folder} does not say of which step it is", "incomplete")
    names = _names(folder)
    for name in names:
        _require_readable(folder / name)
    held = Manifest(
        step=int(state.get("global_step", source.step or 0)),
        tag=source.place.tag,
        tier="full",
        save=uuid.uuid4().hex,
        created=max((folder / name).stat().st_mtime for name in names),
        stage=source.stage,
        world_size=source.world_size,
        versions={"ckpt": __version__} | ({"deepspeed": source.version} if source.version else {}),
        metrics=_metrics(state),
        files={name: manifest.digest(folder / name) for name in names},
    )
    if wrong := manifest.check(folder, held, data=True):
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


def _is_a_trainers(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TRAINER)


def _trainer_state(folder: Path, source: zero.Checkpoint) -> dict[str, Any]:
    """The Trainer's state; ``CheckpointError`` unless it and every rank's RNG state are there.

    Names: transformers ``trainer.py``, ``_save_rng_state``: without a number for a single rank.
    """
    path = folder / "trainer_state.json"
    try:
        state = json.loads(path.read_bytes())
        step = state["global_step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"global_step is {step!r}")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is cut short or damaged: {error!r}") from error
    for rank in range(source.world_size):
        names = [f"rng_state_{rank}.pth", f"rng_state_{rank}.state"]
        names += ["rng_state.pth"] if source.world_size == 1 else []
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(f"{folder} has no RNG state of rank {rank}", "incomplete")
    return dict(state)


def _metrics(state: dict[str, Any]) -> dict[str, float]:
    """What the Trainer's evaluation at this very step logged."""
    found: dict[str, float] = {}
    log = state.get("log_history")
    for entry in log if isinstance(log, list) else ():
        if isinstance(entry, dict) and entry.get("step") == state["global_step"]:
            numbers = {n: v for n, v in entry.items() if isinstance(v, (int, float))}
            found |= {n: float(v) for n, v in numbers.items() if n.startswith("eval_")}
    return found


def _require_readable(path: Path) -> None:
    """Raises for a file that was cut short, as far as its form can tell."""
    if path.suffix == ".safetensors":
        tensors = safetensors.read(path).tensors
        ends = [extent.end for ref in tensors.values() for extent in ref.extents]
        if ends and max(ends) != path.stat().st_size:
            raise CheckpointError(f"{path} has bytes behind its tensors; it is damaged")
    elif path.suffix in (".pt", ".pth") or (path.suffix == ".bin" and path.name.startswith(_BINS)):
        torchzip.read(path)
    elif path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is cut short or damaged: {error}") from error


def _sync(folder: Path, names: list[str]) -> None:
    """Makes files durable that were written without an fsync."""
    for name in names:
        files.sync_file(folder / name)
    for inner, _, _ in os.walk(folder):
        files.sync_folder(Path(inner))
