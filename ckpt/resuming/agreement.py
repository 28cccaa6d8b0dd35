"""Whether all ranks see the checkpoint that rank 0 offers: the same save,
or the same files."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.folders import filenames
from ckpt.runs import digests
from ckpt.runs import manifest as manifests
from ckpt.runs.foreign import resume_files
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, RunCheckpoint, open_checkpoint
from converters.errors import CheckpointError
from converters.storage import local

if TYPE_CHECKING:
    from ckpt.distributed.ranks import RankGroup

# looks, a second apart, until the files of a checkpoint are the same on all ranks
PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Sight:
    """The save that all ranks must see, by its id, or the files of one that has none.

    ``parts``: of how many nodes' folders it is; ``names`` are the files that a resume
    reads with their sizes, of DeepSpeed's tags those of ``tag``.
    """

    name: str
    save: str | None = None
    parts: int = 1
    names: tuple[tuple[str, int], ...] | None = None
    tag: str | None = None

    @classmethod
    def of(cls, checkpoint: RunCheckpoint, tag: str | None = None) -> Sight:
        """A checkpoint as this rank sees it; without a manifest, of this ``tag``, by
        default the one that its file ``latest`` names."""
        manifest = checkpoint.manifest
        if manifest is not None:
            return cls(checkpoint.name, manifest.save, manifest.nodes)

        folder = checkpoint.folder
        if tag is None and folder.is_dir():
            tag = Run(folder).target()
        return cls(checkpoint.name, names=resume_files.fingerprint(folder, tag), tag=tag)

    def plain(self) -> list[Any]:
        """The values as JSON has them."""
        return [self.name, self.save, self.parts, self.names, self.tag]

    @classmethod
    def parse(cls, value: list[Any]) -> Sight:
        """The value that ``plain`` of another rank returned."""
        name, save, parts, names, tag = value
        sizes = names and tuple((path, size) for path, size in names)
        return cls(name, save, parts, sizes, tag)


def mismatch(ranks: RankGroup | None, folder: Path, sight: Sight, data: bool) -> str | None:
    """Why this rank cannot take what rank 0 offers; ``None`` if it can."""
    if sight.save is None:
        return _files_mismatch(ranks, folder, sight, data)
    if not local.wait_for_file(folder / filenames.MANIFEST):
        return "this rank does not see it"

    try:
        manifest = manifests.read(folder)
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)

    if manifest.save != sight.save:
        return f"on this rank it is another save, {manifest.save}, than on rank 0, {sight.save}"

    manifest = _needed_part(checkpoint, manifest)
    if manifest.nodes > 1:
        problems = manifests.check(folder, manifest)
        if problems:
            return problems[0]

    if not data:
        return None

    rank, world = rank_of(ranks), ranks.world if ranks else 1
    if manifest.nodes > 1:  # each node reads its own part
        rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    own_files = {
        name: file
        for index, (name, file) in enumerate(manifest.files.items())
        if index % world == rank
    }
    own_part = replace(manifest, files=own_files)
    problems = manifests.check(folder, own_part, True, _beat(ranks))
    return problems[0] if problems else None


def _needed_part(checkpoint: RunCheckpoint, manifest: Manifest) -> Manifest:
    """The manifest without what no resume reads, which may have been deleted or changed."""
    if not checkpoint.committed:
        return manifest
    needed_files = {
        name: file for name, file in manifest.files.items() if not checkpoint.spares(name)
    }
    return replace(manifest, files=needed_files)


def _files_mismatch(
    ranks: RankGroup | None,
    path: Path,
    sight: Sight,
    data: bool,
) -> str | None:
    """Why the files that this rank sees are not those of rank 0; ``None`` if they are."""
    if not local.wait_for_file(path):
        return "this rank does not see it"

    for attempt in range(PATIENCE):  # a network filesystem shows new files late
        fingerprint = resume_files.fingerprint(path, sight.tag)
        if fingerprint == sight.names:
            break
        time.sleep(1.0 if attempt < PATIENCE - 1 else 0.0)
    else:
        differing = set(fingerprint) ^ set(sight.names or ())
        return f"on this rank it has other files than on rank 0: {min(differing)[0]}"

    rank, world = rank_of(ranks), ranks.world if ranks else 1
    for name, _ in fingerprint[rank::world] if data else ():
        file = path / name if path.is_dir() else path
        reason = digests.unlike(file, digests.digest(file), True, _beat(ranks))
        if reason is not None:
            return f"{name}: {reason}"

    return None


def _beat(ranks: RankGroup | None) -> digests.Progress:
    return (lambda _: ranks.heartbeat(raise_failures=True)) if ranks else digests.quiet


def rank_of(ranks: RankGroup | None) -> int:
    """This process among all ranks; 0 for the only one."""
    return ranks.rank if ranks is not None else 0
