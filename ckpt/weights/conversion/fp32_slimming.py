"""A full checkpoint made a weights-only one that keeps fp32 weights, made of its states.

    convert    .NAME.fp32/ beside the checkpoint: the fp32 weights, proven as those of to-fp32
    manifest   a full one that lists no weights takes the old one's place
    move       the new files come to their places, the 16-bit ones go
    manifest   the weights-only one, which lists the new files
    remove     the states (``ckpt.runs.upkeep.slim``)

A crash before the last manifest leaves a full checkpoint, perhaps without weights, which
training goes on from; a later one a slim one with files that nothing lists. The same
command goes on from either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.folders import filenames, locks, staging
from ckpt.results import FileEntry
from ckpt.runs import engines, pruning
from ckpt.runs import manifest as manifests
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_weights
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.upkeep import slim
from ckpt.runs.upkeep.slim import Slimming
from ckpt.weights.conversion import convert
from ckpt.weights.conversion.task import Conversion
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.options import DTYPE
from converters.storage import local
from converters.tensors import DType

_ROUNDED = (DType.F16, DType.BF16)  # what fp32 masters are rounded to


@dataclass(frozen=True, slots=True)
class Fp32Slimming:
    """The files that are written, and those that go: ``slimming`` as if the new weights
    were there already.

    Without a ``conversion`` the checkpoint is slim, and only leftovers go.
    """

    slimming: Slimming
    conversion: Conversion | None = None

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The weights that are written, by name and bytes."""
        if self.conversion is None:
            return ()
        shards = self.conversion.plan.shards
        return tuple(FileEntry(shard.filename, shard.nbytes) for shard in shards)

    @property
    def nbytes(self) -> int:
        """Bytes that ``execute`` writes and then reads once more for their digests,
        for a bar."""
        return 0 if self.conversion is None else self.conversion.plan.nbytes + _digested(self.files)


def _digested(files: Sequence[FileEntry]) -> int:
    return sum(file.nbytes for file in files)


def plan(checkpoint: RunCheckpoint, force: bool = False, names: str = "reader") -> Fp32Slimming:
    """Plans the fp32 weights and what goes; writes nothing.

    ``names`` is a value of to-fp32's option. ``CheckpointError`` as ``slim.plan``, and
    for states that no model is made of.
    """
    manifest = slim.require_slimmable(checkpoint, force)
    if manifest.tier == "weights":
        return Fp32Slimming(_leftovers(checkpoint, manifest, force))
    if engines.names(manifest):
        raise CheckpointError(
            f"{checkpoint.folder} holds several engines; {DTYPE('fp32')} is for one: "
            f"convert each with ckpt to-fp32, then slim it without {DTYPE}",
            "unsupported",
        )

    conversion = _planned(checkpoint, manifest, names)
    if not conversion.checkpoint.weights.copies:
        # the 16-bit weights that go are no authority over the states that they are
        # compared with
        conversion = replace(conversion, product=replace(conversion.product, strict=False))
    with staging.without_choice(_alternative()):
        convert.require_output(conversion, overwrite=True)
    interim = _without_weights(manifest, conversion)
    old_names = {name for name in manifest.files if name not in interim.files}
    slimming = slim.without_states(replace(checkpoint, manifest=interim), interim)
    removed = {*slimming.removed, *(name for name in old_names if is_weights(name))}
    removed_names = tuple(sorted(removed - {*_new_names(conversion)}))
    tensor_count = sum(len(shard.placements) for shard in conversion.plan.shards)

    return Fp32Slimming(
        replace(
            slimming,
            checkpoint=checkpoint,
            removed=removed_names,
            nbytes=sum((checkpoint.folder / name).lstat().st_size for name in removed_names),
            proven=(f"fp32 weights of {tensor_count:,} tensors, made of the states",),
            dtypes=("F32",),
        ),
        conversion,
    )


def _planned(checkpoint: RunCheckpoint, manifest: Manifest, names: str) -> Conversion:
    return convert.plan(
        checkpoint.folder,
        _staging_folder(checkpoint),
        tag=manifest.tag,
        dtype="fp32",
        request=Request(naming=Naming().with_names(names)),
    )


def _leftovers(checkpoint: RunCheckpoint, manifest: Manifest, force: bool) -> Slimming:
    """What an earlier run left of a checkpoint that is slim already.

    ``CheckpointError`` if its weights are not fp32: there are no states to make them of.
    """
    paths = [checkpoint.folder / name for name in manifest.files if name.endswith(".safetensors")]
    dtypes = {tensor.dtype for path in paths for tensor in safetensors.read(path).tensors.values()}
    rounded_names = [dtype.value for dtype in _ROUNDED if dtype in dtypes]
    if rounded_names:
        raise CheckpointError(
            f"{checkpoint.folder} is slim already, with weights in "
            f"{' and '.join(rounded_names)}: the states that fp32 weights are made of are gone",
            "refused",
        )

    return slim.plan(checkpoint, force)


def execute(planned: Fp32Slimming, progress: Callable[[int], None] = lambda _: None) -> None:
    """Writes the weights, commits them, and then deletes; ``CheckpointError`` if the
    checkpoint is in use."""
    conversion, checkpoint = planned.conversion, planned.slimming.checkpoint
    staging_folder, folder = _staging_folder(checkpoint), checkpoint.folder
    pruning.remove(staging_folder)  # of an earlier try
    if conversion is None:
        slim.execute(planned.slimming)
        return

    with staging.without_choice(_alternative()):
        convert.execute(conversion, progress=progress)

    assert checkpoint.manifest is not None
    interim = _without_weights(checkpoint.manifest, conversion)
    manifest_path = folder / filenames.MANIFEST
    with slim.lock_of(checkpoint), locks.replaced(manifest_path, interim.dumps()):
        _move(staging_folder, folder, conversion, planned.slimming)
        new_files = {
            name: manifests.digest(folder / name, progress) for name in _new_names(conversion)
        }
        slimming = replace(
            planned.slimming,
            manifest=replace(
                planned.slimming.manifest, files={**planned.slimming.manifest.files, **new_files}
            ),
        )
        slim.commit(slimming, locks.replaced(manifest_path, slimming.manifest.dumps()))

    pruning.remove(staging_folder)


def _staging_folder(checkpoint: RunCheckpoint) -> Path:
    """A hidden folder on the disk of the checkpoint,
    which ``ckpt doctor`` knows as a leftover."""
    folder = checkpoint.folder.resolve()
    return folder.with_name(f".{folder.name}.fp32")


def _alternative() -> str:
    """What to do where the new weights do not fit beside the checkpoint."""
    return f"slim it without {DTYPE}, which writes nothing"


def _new_names(conversion: Conversion) -> list[str]:
    """The files that come into the checkpoint: weights, their index, and configurations."""
    index = [conversion.plan.index[0]] if conversion.plan.index is not None else []
    return [*(shard.filename for shard in conversion.plan.shards), *index, *conversion.texts]


def _without_weights(manifest: Manifest, conversion: Conversion) -> Manifest:
    """The full manifest without the weights, and without what the new ones replace."""
    new_names = {*_new_names(conversion)}
    files = {
        name: file
        for name, file in manifest.files.items()
        if not is_weights(name) and name not in new_names
    }

    return replace(manifest, files=files)


def _move(staging_folder: Path, folder: Path, conversion: Conversion, slimming: Slimming) -> None:
    """Brings the new files to their places; the old weights,
    which nothing lists, go first."""
    for name in slimming.removed:
        if is_weights(name):
            (folder / name).unlink(missing_ok=True)

    for name in _new_names(conversion):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging_folder / name, folder / name)
        local.sync_folder((folder / name).parent)
