"""Whether all ranks see the checkpoint that rank 0 offers: the same save, or the same files."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.runs import digests, liveness
from ckpt.runs import manifest as manifests
from ckpt.runs.run import Checkpoint, open_checkpoint
from converters import files
from converters.errors import CheckpointError

PATIENCE = 3  # looks, a second apart, until the files of a checkpoint are the same on all ranks


@dataclass(frozen=True, slots=True)
class Sight:
    """What all ranks must see: a save, by its id, or the files of one that has none.

    ``parts``: of how many nodes' folders it is; ``names`` are files with their sizes.
    """

    name: str
    save: str | None = None
    parts: int = 1
    names: tuple[tuple[str, int], ...] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sight:
        """As this rank sees it."""
        held = checkpoint.manifest
        if held is not None:
            return cls(checkpoint.name, held.save, held.nodes)
        return cls(checkpoint.name, names=liveness.fingerprint(checkpoint.folder))

    def plain(self) -> list[Any]:
        """As JSON."""
        return [self.name, self.save, self.parts, self.names]

    @classmethod
    def parse(cls, value: list[Any]) -> Sight:
        """From JSON."""
        name, save, parts, names = value
        return cls(name, save, parts, names and tuple((name, size) for name, size in names))


def unlike(ranks: Ranks | None, folder: Path, sight: Sight, data: bool) -> str | None:
    """Why this rank cannot take what rank 0 offers; ``None`` if it can."""
    if sight.save is None:
        return _unlike_files(ranks, folder, sight, data)
    if not files.appears(folder / manifests.NAME):
        return "this rank does not see it"
    try:
        held = manifests.read(folder)
        found = open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    if held.save != sight.save:
        return f"on this rank it is another save, {held.save}, than on rank 0, {sight.save}"
    spared = found.deleted if found.committed else ()  # which no resume needs
    held = replace(held, files={n: f for n, f in held.files.items() if n not in spared})
    if held.nodes > 1:
        problems = manifests.check(folder, held)
        if problems:
            return problems[0]
    if not data:
        return None
    rank, world = rank_of(ranks), ranks.world if ranks else 1
    if held.nodes > 1:  # each node reads its own part
        rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mine = {n: f for i, (n, f) in enumerate(held.files.items()) if i % world == rank}
    problems = manifests.check(folder, replace(held, files=mine), True, _beat(ranks))
    return problems[0] if problems else None


def _unlike_files(ranks: Ranks | None, path: Path, sight: Sight, data: bool) -> str | None:
    """The same for one without a manifest: every rank must see the same files."""
    if not files.appears(path):
        return "this rank does not see it"
    for tries in range(PATIENCE):  # a network filesystem shows new files late
        seen = liveness.fingerprint(path)
        if seen == sight.names:
            break
        time.sleep(1.0 if tries < PATIENCE - 1 else 0.0)
    else:
        differing = set(seen) ^ set(sight.names or ())
        return f"on this rank it has other files than on rank 0: {min(differing)[0]}"
    rank, world = rank_of(ranks), ranks.world if ranks else 1
    for name, _ in seen[rank::world] if data else ():
        file = path / name if path.is_dir() else path
        why = digests.unlike(file, digests.digest(file), True, _beat(ranks))
        if why is not None:
            return f"{name}: {why}"
    return None


def _beat(ranks: Ranks | None) -> digests.Progress:
    return (lambda _: ranks.beat(heed=True)) if ranks else digests.quiet


def rank_of(ranks: Ranks | None) -> int:
    """This process among all ranks; 0 for the only one."""
    return ranks.rank if ranks is not None else 0
