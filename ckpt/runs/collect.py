"""The parts of one save that lie on several nodes, joined to one checkpoint.

    /node0/checkpoint-500/   manifest: save 3f.., node 0 of 2, its files
    /node1/checkpoint-500/   manifest: save 3f.., node 1 of 2, its files   -->  DIR: node 0 of 1

Every file is digested while it is copied. A name that two nodes have must have one digest; but for
the module's file of stages 0 to 2, of which each node writes one: only rank 0's has the names of
tied parameters (``shared_params``: DeepSpeed 0.19.8 ``runtime/engine.py``), so node 0's is taken.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.renaming import is_arriving, replace_folder
from ckpt.runs import engines, locks, manifest
from ckpt.runs.digests import CHUNK, Progress, quiet
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint, open_checkpoint
from ckpt.runs.verify import states
from converters import files
from converters.errors import CheckpointError

_MODULE = re.compile(r".*/mp_rank_\d+_model_states\.pt")
_SAME = ("save", "step", "tag", "tier", "nodes", "stage", "world_size")


@dataclass(frozen=True, slots=True)
class Collection:
    """What is joined: for every name the folder it comes from, and the manifest of the whole.

    ``output`` may be one of the nodes' folders; the other files are then added to it.
    """

    output: Path
    sources: tuple[Checkpoint, ...]
    files: dict[str, Path]
    manifest: Manifest

    @property
    def inside(self) -> bool:
        """Whether the output is a node's own folder."""
        return any(_same(self.output, source.folder) for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        held = self.manifest.files
        return sum(held[n].size for n, p in self.files.items() if not _same(p, self.output))


def plan(folders: Sequence[Path], output: Path) -> Collection:
    """Decides what is copied; ``CheckpointError`` unless these are all parts of one save."""
    sources = sorted((_part(folder) for folder in folders), key=_node)
    manifests = [source.manifest for source in sources if source.manifest is not None]
    first = manifests[0]
    for source, held in zip(sources, manifests, strict=True):
        for name in _SAME:
            if getattr(held, name) != getattr(first, name):
                raise CheckpointError(
                    f"{source.folder} is of another save than {sources[0].folder}: its {name} is "
                    f"{getattr(held, name)}, expected {getattr(first, name)}"
                )
    nodes = [held.node for held in manifests]
    missing = sorted(set(range(first.nodes)) - set(nodes))
    if missing or len(nodes) != first.nodes:
        twice = sorted({node for node in nodes if nodes.count(node) > 1})
        what = f"node {missing[0]} is missing" if missing else f"node {twice[0]} is there twice"
        raise CheckpointError(
            f"{sources[0].folder} was saved by {first.nodes} nodes, but {what}; name the folder of "
            "each node once",
            "incomplete",
        )
    chosen: dict[str, Path] = {}
    listed: dict[str, manifest.File] = {}
    for source, held in zip(sources, manifests, strict=True):
        for name, file in held.files.items():
            if listed.setdefault(name, file) != file:
                if _MODULE.fullmatch(name) and not _same(source.folder, output):
                    continue
                raise CheckpointError(
                    f"{source.folder / name} is not the file that {chosen[name] / name} is; which "
                    "one belongs to the checkpoint cannot be told; collect node 0's own folder, or "
                    "into a new one with -o"
                )
            if name not in chosen or _same(source.folder, output):
                chosen[name] = source.folder
    whole = replace(first, node=0, nodes=1, files=listed)
    made = Collection(output, tuple(sources), chosen, whole)
    taken = (output.exists() and not is_arriving(output)) or output.is_symlink()
    if not made.inside and (taken or not output.name):
        raise CheckpointError(f"{output} exists already; name a new folder with -o", "output")
    return made


def _part(folder: Path) -> Checkpoint:
    found = open_checkpoint(folder)
    if found.why is not None:
        raise CheckpointError(f"{folder} is not committed: {found.why}", "incomplete")
    if found.lacks is not None:
        raise CheckpointError(
            f"{folder} {found.lacks}; ckpt doctor {folder.parent} --fix takes it off the manifest",
            "incomplete",
        )
    return found


def _node(checkpoint: Checkpoint) -> int:
    return checkpoint.manifest.node if checkpoint.manifest else 0


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and os.path.samefile(one, other)


def execute(collection: Collection, progress: Progress = quiet) -> None:
    """Copies, verifies and commits, all at once.

    ``CheckpointError`` if a byte is wrong or the disk too small; then the output is as it was.
    """
    output = collection.output
    parent = Path(os.path.abspath(output)).parent
    parent.mkdir(parents=True, exist_ok=True)
    free = files.free_space(parent)
    if collection.nbytes > free:
        raise CheckpointError(
            f"{parent} has {free:,} bytes free, the checkpoint needs {collection.nbytes:,}; make "
            "room or choose another folder with -o",
            "output",
        )
    locked = [locks.reading(source.folder) for source in collection.sources]
    try:
        if collection.inside:
            _fill(collection, output, progress)
            _commit(collection, output)
        else:
            _stage(collection, parent / f".{output.name}.saving", progress)
    finally:
        for lock in locked:
            lock.release()


def _stage(collection: Collection, staging: Path, progress: Progress) -> None:
    """Makes the checkpoint under a name that no tool takes for one, and renames it."""
    with locks.claimed(staging):
        try:
            _fill(collection, staging, progress)
            _commit(collection, staging)
            (staging / locks.LOCK).unlink()
            files.sync_folder(staging)
            replace_folder(staging, collection.output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _fill(collection: Collection, folder: Path, progress: Progress) -> None:
    """Copies what is not there yet, each file whole or not at all, with its digest."""
    for name, source in collection.files.items():
        if _same(source, folder):
            continue
        target, expected = folder / name, collection.manifest.files[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as fd, open(source / name, "rb") as file:
            at, writer = 0, files.Writer(fd)
            while True:
                with files.named(source / name):
                    piece = file.read(CHUNK)
                if not piece:
                    break
                writer.write(piece, at)
                at += len(piece)
                progress(len(piece))
        only = replace(collection.manifest, files={name: expected})
        if wrong := manifest.check(folder, only, data=True):
            target.unlink()
            raise CheckpointError(f"{source} is damaged: {wrong[0]}; nothing was collected")


def _commit(collection: Collection, folder: Path) -> None:
    """Proves the whole and writes its manifest, which replaces a node's own at once."""
    held = collection.manifest
    if held.tier == "full":
        for tag in engines.tags(held).values():
            _, wrong = states(folder, tag)
            if wrong is not None:
                raise CheckpointError(f"{wrong}; nothing was collected")
    for inner, _, _ in os.walk(folder):
        files.sync_folder(Path(inner))
    files.write_file(folder / manifest.NAME, held.dumps())
    files.sync_folder(folder)
