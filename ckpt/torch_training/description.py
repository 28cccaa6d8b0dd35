"""``.metadata`` of a save,
from the notes of all ranks; rank 0 writes it when all have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ckpt.runs.manifest import FileRecord, digest
from ckpt.torch_training.capture import FILENAME, LeafForm
from converters.dcp.writing import metadata
from converters.dcp.writing.metadata import Chunk, ItemSpan, ObjectRecord, TensorRecord, dotted
from converters.errors import CheckpointError
from converters.storage import local
from converters.torch_files.element_types import DTYPES


def write(folder: Path, forms: Sequence[LeafForm], notes: Sequence[Any]) -> dict[str, FileRecord]:
    """Writes ``.metadata`` into the folder, on disk when it returns; ``notes`` by rank.

    ``CheckpointError`` where ranks have different parameters, or not all of a tensor was
    written.
    """
    _require_same_names(folder, notes)
    places: dict[int, dict[Any, Any]] = {}
    for rank, (_, items) in enumerate(notes):
        for index, offsets, sizes, start, nbytes in items:
            span = ItemSpan(FILENAME.format(rank), start, nbytes)
            key = None if offsets is None else tuple(offsets)
            # replicas that no mesh tells of: those of one rank count
            places.setdefault(index, {}).setdefault(key, (sizes, span))

    records = [_record(folder, form, places.get(index, {})) for index, form in enumerate(forms)]
    path = folder / metadata.NAME
    local.write_file(path, metadata.content(records))
    return {metadata.NAME: digest(path)}


def _require_same_names(folder: Path, notes: Sequence[Any]) -> None:
    for rank, (names_digest, _) in enumerate(notes):
        if names_digest != notes[0][0]:
            raise CheckpointError(
                f"{folder}: rank {rank} has other parameters, shapes or options than rank 0; "
                "ckpt.Saver saves trainings whose ranks have the same model (FSDP2, DDP), and not "
                "stages of a pipeline",
                "unsupported",
            )


def _record(folder: Path, form: LeafForm, places: Mapping[Any, Any]) -> TensorRecord | ObjectRecord:
    if form.dtype is None:
        return ObjectRecord(form.path, places[None][1])

    numel = sum(prod(sizes) for sizes, _ in places.values())
    if numel != prod(form.shape) or not places:
        raise CheckpointError(
            f"{folder}: ranks wrote {numel:,} of the {prod(form.shape):,} elements of "
            f"{dotted(form.path)}; its sharding is none that ckpt.Saver saves",
            "unsupported",
        )
    chunks = [
        Chunk(offsets, tuple(sizes), span) for offsets, (sizes, span) in sorted(places.items())
    ]
    return TensorRecord(form.path, DTYPES[form.dtype], form.shape, chunks)
