"""The record of a rewritten state: its manifest,
or else a record of what it was made of.

A state that is made of a committed one has a manifest, as that has. The universal format
has none, and what is made of a checkpoint without a manifest gets none: nobody said that
its save finished. Then ``rewriting.json`` says what it was made of.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from ckpt.folders import filenames
from ckpt.runs import manifest as manifests
from ckpt.runs.ancestry import Ancestry, Record, record_in
from ckpt.runs.foreign import value_samples
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import require_read
from ckpt.runs.verify import changes_since_commit
from ckpt.version import __version__
from converters.detect.deepspeed import UNIVERSAL
from converters.errors import CheckpointError
from converters.options import NO_VERIFY_OF_STATES
from converters.source import Source
from converters.storage import local
from converters.storage.store import is_url
from converters.zero import checkpoint as zero
from converters.zero import weights_16bit
from converters.zero.native.target import TargetTopology


def source_manifest(home: Path, tag_name: str) -> Manifest | None:
    """The manifest of the checkpoint in ``home``, if it has one that is of this tag."""
    try:
        manifest = manifests.read(home)
    except CheckpointError as error:  # there is none, or none that anybody could use
        require_read(error)
        return None

    return manifest if manifest.tag == tag_name else None


def first_origin(home: Path, manifest: Manifest | None, origin: Ancestry) -> Ancestry:
    """``origin``, as far as a training saved that;
    else what that was made of, by way of it.

    ``home`` and ``manifest`` are those of the checkpoint that is rewritten.
    """
    if manifest is not None:
        earlier = manifest.origin
        origin = replace(origin, save=manifest.save, step=manifest.step)
    else:
        record = record_in(home)
        earlier = None if record is None else record.source
    if earlier is not None and earlier.is_rewriting:
        parent = replace(origin, form=earlier.form, parent=earlier.parent)
        return replace(earlier, form=origin.form, parent=parent)

    return origin


def write_record(
    folder: Path,
    origin: Ancestry,
    target: TargetTopology | None,
    buffers: Collection[str] | None = None,
) -> None:
    """Writes ``rewriting.json``;
    ``target`` is ``None`` for the universal format and DCP.

    ``buffers`` are those of the model, for what does not tell them from parameters.
    """
    record = Record(origin, buffers=None if buffers is None else tuple(sorted(buffers)))
    if target is not None:
        record = Record(origin, target.stage, target.rank_count)
    local.write_file(folder / filenames.REWRITING, record.dumps())


def save_of(source: Manifest, target: TargetTopology) -> str:
    """The save that a committed checkpoint becomes: the same for the same target."""
    degrees = [
        f" {name} {count}"
        for name, count in (("tp", target.tensor_ranks), ("ep", target.expert_ranks))
        if count > 1
    ]
    if target.stages:
        degrees.append(f" pp {','.join(map(str, target.stages))}")
    return sha256(f"{source.save} {target}{''.join(degrees)}".encode()).hexdigest()[:32]


def rewritten(source: Manifest, target: TargetTopology, origin: Ancestry) -> Manifest:
    """The source's manifest for another topology, before it lists any file.

    It says what it is made of: making it says nothing about which run saved last.
    """
    return replace(
        source,
        stage=target.stage,
        world_size=target.rank_count,
        node=0,
        nodes=1,
        save=save_of(source, target),
        made_of=source.save,
        source=origin,
        versions={**source.versions, "ckpt": __version__},
        files={},
    )


def write_manifest(folder: Path, manifest: Manifest, name: str) -> None:
    """Writes the manifest of all that lies in ``folder``, which will be called ``name``."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in paths
        if path.name not in (filenames.PLAN, filenames.LOGBOOK)
    }
    complete_manifest = replace(manifest, created=time.time(), name=name, files=files)
    local.write_file(folder / filenames.MANIFEST, complete_manifest.dumps())


def _digest(path: Path) -> manifests.FileRecord:
    with local.naming_path(path):
        return manifests.digest(path)


def require_one_save(source: Source) -> None:
    """``CheckpointError`` where the files of a source are proven to be of two saves.

    By the digests in its manifest, if it has one, and by the values of what is stored
    twice. In a remote store, where each look takes as long as a megabyte, the digests
    are not compared, and fewer values are.
    """
    if not isinstance(source, zero.Checkpoint):
        return
    manifest = None
    if source.kind != UNIVERSAL:  # which is no save, and may lie beside the one it was made of
        manifest = source_manifest(source.place.root, source.place.tag)
    if manifest is not None and not is_url(source.place.root):
        _require_unchanged(source.place.root, manifest, source.place.tag)
    has_known_doubt = manifest is not None and manifest.doubt is not None
    if source.ranks and not has_known_doubt:
        value_samples.require_same(
            source,
            f"{weights_16bit.disagreement(source)}; bring back the files of one save, or write "
            f"them as they are with {NO_VERIFY_OF_STATES}",
        )


def _require_unchanged(home: Path, manifest: Manifest, tag_name: str) -> None:
    """``CheckpointError`` where state files were written again after the commit."""
    for name, difference in changes_since_commit(home, manifest, f"{tag_name}/").items():
        raise CheckpointError(
            f"{home / name} was changed since the checkpoint was committed: {difference}; bring "
            f"back the file, or write what is there with {NO_VERIFY_OF_STATES}"
        )
