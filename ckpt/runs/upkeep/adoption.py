"""A manifest for a checkpoint that was written without ckpt, if it proves to be whole.

Nobody said that its save finished, so everything that can be checked is: that it is
whole by what its writer writes (``completeness``) and does not change meanwhile
(``liveness``), and that every record of a torch zip has its CRC32.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.folders import filenames
from ckpt.runs import manifest
from ckpt.runs.fields import FieldError
from ckpt.runs.foreign import completeness, intact_files, liveness, succession
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, RunCheckpoint
from ckpt.version import __version__
from converters import detect
from converters.errors import CheckpointError
from converters.source import Source
from converters.storage import local
from converters.storage.system import flock


@dataclass(frozen=True, slots=True)
class Adoption:
    """A checkpoint that proved to be whole, and the manifest that it would get."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class AdoptionOutcome:
    """What became of a checkpoint without a manifest; ``reason`` says why it got none."""

    folder: Path
    adopted: bool
    reason: str | None = None


def adopt(run: Run, dry_run: bool = False) -> list[AdoptionOutcome]:
    """Commits what is whole; returns every checkpoint without a manifest, and why it got none.

    ``dry_run`` proves the same and writes nothing.
    """
    if not dry_run:
        flock.require("ckpt doctor --adopt")

    outcomes = []
    for checkpoint in run.checkpoints():
        if checkpoint.manifest is not None or not _may_be_adopted(checkpoint):
            continue

        try:
            adoption = plan(checkpoint.folder)
            if not dry_run:
                execute(adoption)
            outcomes.append(AdoptionOutcome(checkpoint.folder, True))
        except CheckpointError as error:
            outcomes.append(AdoptionOutcome(checkpoint.folder, False, str(error)))

    return outcomes


def _may_be_adopted(checkpoint: RunCheckpoint) -> bool:
    """Whether a checkpoint may get a manifest: it has none, or one that is damaged."""
    if checkpoint.why == manifest.ABSENT:
        return True

    try:
        manifest.read(checkpoint.folder)
    except CheckpointError as error:
        return error.kind == "corrupt"  # not one of a newer ckpt

    return False


def commit(folder: Path, data: bool = True) -> Manifest:
    """Gives a whole checkpoint its manifest: ``plan`` and ``execute``."""
    return execute(plan(folder, data))


def plan(folder: Path, data: bool = True) -> Adoption:
    """Proves that a checkpoint is whole; ``CheckpointError`` if it is not. Writes nothing.

    Without ``data`` the records of torch zips are not read: a later ``verify --data``
    compares them with the CRC32s that they had when they were saved.
    """
    proof = liveness.prove_at_rest(folder)
    if proof.tag is None:
        raise CheckpointError(
            f"{folder} is whole, written by {proof.kind}; a manifest is for what "
            "DeepSpeed wrote. ckpt.find takes it as it is",
            "unsupported",
        )

    source = detect.read(folder, complete=True)
    if source.place.root != folder:
        raise CheckpointError(
            f"{folder} is the folder of a tag; commit the one above: ckpt doctor "
            f"{folder.absolute().parent.parent} --adopt",
            "refused",
        )
    if proof.step is None:
        raise CheckpointError(f"{folder} does not say of which step it is", "incomplete")

    file_names = _file_names(folder)
    for file_name in file_names:
        intact_files.require_file(folder / file_name)

    try:
        new_manifest = _manifest(source, proof.step, file_names, proof.history is not None)
    except FieldError as error:
        raise CheckpointError(
            f"{folder} is whole, but a manifest cannot list it: {error}; rename or move away "
            "what it names",
            "unsupported",
        ) from error
    if problems := manifest.check(folder, new_manifest, data):
        raise CheckpointError(f"{folder} is damaged: {problems[0]}")

    return Adoption(folder, new_manifest)


def execute(adoption: Adoption) -> Manifest:
    """Writes the manifest, durably, after the files that it lists."""
    folder = adoption.folder
    _sync(folder, list(adoption.manifest.files))
    local.write_file(folder / filenames.MANIFEST, adoption.manifest.dumps())
    local.sync_folder(folder)

    return adoption.manifest


def _manifest(source: Source, step: int, file_names: Sequence[str], by_trainer: bool) -> Manifest:
    """What the save would have written, had it been ckpt's."""
    folder = source.place.root
    trainer_state = completeness.trainer_state(folder) if by_trainer else {}
    line = succession.line_after(folder, step)
    versions = {"ckpt": __version__}
    if source.version:
        versions["deepspeed"] = source.version

    return Manifest(
        step=step,
        tag=source.place.tag,
        tier="full",
        save=uuid.uuid4().hex,
        created=max((folder / file_name).stat().st_mtime for file_name in file_names),
        stage=source.stage,
        world_size=source.world_size,
        versions=versions,
        metrics=_metrics(trainer_state),
        files={file_name: manifest.digest(folder / file_name) for file_name in file_names},
        run=line.run if line else None,
        line=line.at(step) if line else (),
        name=folder.name,
    )


def _file_names(folder: Path) -> list[str]:
    """Every file but hidden ones, temporary ones and those of the tool."""
    relative_paths = (
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    )
    return [
        relative_path
        for relative_path in relative_paths
        if relative_path != filenames.MANIFEST  # damaged, or there would be nothing to adopt
        and not any(part.startswith(".") for part in relative_path.split("/"))
        and not relative_path.endswith(".partial")
    ]


def _metrics(state: dict[str, Any]) -> dict[str, float]:
    """What the Trainer's evaluation at this very step logged."""
    metrics: dict[str, float] = {}
    log_history = state.get("log_history")
    for entry in log_history if isinstance(log_history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == state.get("global_step"):
            numbers = {
                metric_name: value
                for metric_name, value in entry.items()
                if isinstance(value, (int, float))
            }
            metrics |= {
                metric_name: float(value)
                for metric_name, value in numbers.items()
                if metric_name.startswith("eval_")
            }

    return metrics


def _sync(folder: Path, names: list[str]) -> None:
    """Makes files durable that were written without an fsync."""
    for file_name in names:
        local.sync_file(folder / file_name)
    for subfolder, _, _ in os.walk(folder):
        local.sync_folder(Path(subfolder))
