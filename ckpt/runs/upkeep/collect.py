"""The parts of one save that lie on several nodes, joined to one checkpoint.

    /node0/checkpoint-500/   manifest: save 3f.., node 0 of 2, its files
    /node1/checkpoint-500/   manifest: save 3f.., node 1 of 2, its files   -->  DIR: node 0 of 1

Every file is digested while it is copied. A name that two nodes have must have one
digest; but for the module's file of stages 0 to 2, of which each node writes one: only
rank 0's has the names of tied parameters (``shared_params``: DeepSpeed 0.19.8
``runtime/engine.py``), so node 0's is taken.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.folders import filenames, locks, staging
from ckpt.folders.replacing import is_arriving, replace_folder
from ckpt.runs import engines, manifest, user_paths
from ckpt.runs.digests import CHUNK, Progress, quiet
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.verify import states
from converters.accessors import missing_numbers
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import OUTPUT
from converters.storage import local
from converters.words import counted, shell_word

_MODULE = LazyPattern(r".*/mp_rank_\d+_model_states\.pt")
_COMMON_FIELDS = ("save", "step", "tag", "tier", "nodes", "stage", "world_size")


@dataclass(frozen=True, slots=True)
class Collection:
    """The parts that are joined: for every name the folder it comes from, and the
    manifest of the whole.

    ``output`` may be one of the nodes' folders; the other files are then added to it.
    """

    output: Path
    sources: tuple[RunCheckpoint, ...]
    files: dict[str, Path]
    manifest: Manifest

    @property
    def inside(self) -> bool:
        """Whether the output is a node's own folder."""
        return any(_is_same_folder(self.output, source.folder) for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        listed_files = self.manifest.files
        return sum(
            listed_files[file_name].size
            for file_name, source_folder in self.files.items()
            if not _is_same_folder(source_folder, self.output)
        )


def plan(folders: Sequence[Path], output: Path) -> Collection:
    """Decides what is copied;
    ``CheckpointError`` unless these are all parts of one save."""
    sources = sorted((_part(folder) for folder in folders), key=_node)
    user_paths.require_outside(output, folders)
    manifests = [source.manifest for source in sources if source.manifest is not None]
    _require_one_save(sources, manifests)
    _require_all_nodes(sources[0].folder, manifests)

    source_folders, listed_files = _joined_files(sources, manifests, output)
    joined_manifest = replace(manifests[0], node=0, nodes=1, files=listed_files)
    collection = Collection(output, tuple(sources), source_folders, joined_manifest)
    is_taken = (output.exists() and not is_arriving(output)) or output.is_symlink()
    if not collection.inside and (is_taken or not output.name):
        raise CheckpointError(
            f"{output} exists already; name a new folder with {OUTPUT}",
            "output",
        )

    return collection


def _require_one_save(sources: Sequence[RunCheckpoint], manifests: Sequence[Manifest]) -> None:
    first_manifest = manifests[0]
    for source, node_manifest in zip(sources, manifests, strict=True):
        for field_name in _COMMON_FIELDS:
            if getattr(node_manifest, field_name) != getattr(first_manifest, field_name):
                raise CheckpointError(
                    f"{source.folder} is of another save than {sources[0].folder}: its "
                    f"{field_name} is {getattr(node_manifest, field_name)}, expected "
                    f"{getattr(first_manifest, field_name)}; name the folders of one save",
                    "refused",
                )


def _require_all_nodes(first_folder: Path, manifests: Sequence[Manifest]) -> None:
    """``CheckpointError`` unless each node's part is there, once."""
    node_count = manifests[0].nodes
    node_numbers = [node_manifest.node for node_manifest in manifests]
    missing_nodes = missing_numbers(node_count, node_numbers)
    if not missing_nodes and len(node_numbers) == node_count:
        return

    repeated_nodes = sorted({node for node in node_numbers if node_numbers.count(node) > 1})
    problem = (
        f"node {missing_nodes[0]} is missing"
        if missing_nodes
        else f"node {repeated_nodes[0]} is there twice"
    )
    raise CheckpointError(
        f"{first_folder} was saved by {counted(node_count, 'node')}, but "
        f"{problem}; name the folder of each node once",
        "incomplete",
    )


def _joined_files(
    sources: Sequence[RunCheckpoint], manifests: Sequence[Manifest], output: Path
) -> tuple[dict[str, Path], dict[str, manifest.FileRecord]]:
    """For every name the folder that its file comes from,
    and what the manifests say of it."""
    source_folders: dict[str, Path] = {}
    listed_files: dict[str, manifest.FileRecord] = {}
    for source, node_manifest in zip(sources, manifests, strict=True):
        for file_name, file in node_manifest.files.items():
            if listed_files.setdefault(file_name, file) != file:
                if _MODULE.fullmatch(file_name) and not _is_same_folder(source.folder, output):
                    continue

                raise CheckpointError(
                    f"{source.folder / file_name} is not the file that "
                    f"{source_folders[file_name] / file_name} is; which one belongs to "
                    "the checkpoint cannot be told; collect node 0's own folder, or into "
                    f"a new one with {OUTPUT}",
                    "refused",
                )

            if file_name not in source_folders or _is_same_folder(source.folder, output):
                source_folders[file_name] = source.folder

    return source_folders, listed_files


def _part(folder: Path) -> RunCheckpoint:
    node_checkpoint = user_paths.checkpoint_at(folder, "ckpt collect")
    user_paths.require_deepspeed(node_checkpoint)
    if node_checkpoint.why is not None:
        raise CheckpointError(
            f"{folder} is not committed: {node_checkpoint.why}",
            "incomplete",
        )
    if node_checkpoint.changes is not None:
        raise CheckpointError(
            f"{folder} has files {node_checkpoint.changes}; bring back those of the save",
            "incomplete",
        )
    if node_checkpoint.lacks is not None:
        raise CheckpointError(
            f"{folder} {node_checkpoint.lacks}; ckpt doctor {shell_word(folder.parent)} --fix "
            "takes it off the manifest",
            "incomplete",
        )

    return node_checkpoint


def _node(checkpoint: RunCheckpoint) -> int:
    return checkpoint.manifest.node if checkpoint.manifest else 0


def _is_same_folder(first_path: Path, second_path: Path) -> bool:
    if not first_path.exists() or not second_path.exists():
        return False

    return os.path.samefile(first_path, second_path)


def execute(collection: Collection, progress: Progress = quiet) -> None:
    """Copies, verifies and commits, all at once.

    ``CheckpointError`` if a byte is wrong or the disk too small; then the output is as
    it was.
    """
    output = collection.output
    parent_folder = Path(os.path.abspath(output)).parent
    parent_folder.mkdir(parents=True, exist_ok=True)
    _require_room(collection)

    read_locks = [locks.reading(source.folder) for source in collection.sources]
    try:
        if collection.inside:
            _fill(collection, output, progress)
            _commit(collection, output)
        else:
            _stage(collection, parent_folder / f".{output.name}.saving", progress)
    finally:
        for lock in read_locks:
            lock.release()


def require_output(collection: Collection) -> None:
    """``CheckpointError`` where ``execute`` would refuse
    to make the output; makes nothing."""
    output = collection.output
    # into a node's own folder files are added
    place = output / filenames.MANIFEST if collection.inside else output
    staging.require_makeable(place, collection.nbytes)
    _require_room(collection)


def _require_room(collection: Collection) -> None:
    folder = staging.folder_for(Path(os.path.abspath(collection.output)))
    staging.require_room(folder, collection.nbytes, staging.another_folder())


def _stage(collection: Collection, staged_folder: Path, progress: Progress) -> None:
    """Makes the checkpoint under a name that no tool takes for one, and renames it."""
    with locks.claimed(staged_folder):
        try:
            _fill(collection, staged_folder, progress)
            _commit(collection, staged_folder)
            (staged_folder / filenames.LOCK).unlink()
            local.sync_folder(staged_folder)
            replace_folder(staged_folder, collection.output)
        except BaseException:
            shutil.rmtree(staged_folder, ignore_errors=True)
            raise


def _fill(collection: Collection, folder: Path, progress: Progress) -> None:
    """Copies what is not there yet, each file whole or not at all, with its digest."""
    for file_name, source_folder in collection.files.items():
        if _is_same_folder(source_folder, folder):
            continue

        target_path = folder / file_name
        expected_file = collection.manifest.files[file_name]
        target_path.parent.mkdir(parents=True, exist_ok=True)
        with local.replacing(target_path) as fd, open(source_folder / file_name, "rb") as stream:
            offset, writer = 0, local.LocalWriter(fd)
            while True:
                with local.naming_path(source_folder / file_name):
                    block = stream.read(CHUNK)
                if not block:
                    break

                writer.write(block, offset)
                offset += len(block)
                progress(len(block))

        single_manifest = replace(collection.manifest, files={file_name: expected_file})
        if problems := manifest.check(folder, single_manifest, data=True):
            target_path.unlink()
            raise CheckpointError(
                f"{source_folder} is damaged: {problems[0]}; nothing was collected"
            )


def _commit(collection: Collection, folder: Path) -> None:
    """Proves the whole and writes its manifest, which replaces a node's own at once."""
    joined_manifest = collection.manifest
    if joined_manifest.tier == "full":
        for tag in engines.tags(joined_manifest).values():
            _, problem = states(folder, tag)
            if problem is not None:
                raise CheckpointError(f"{problem}; nothing was collected")

    for subfolder, _, _ in os.walk(folder):
        local.sync_folder(Path(subfolder))
    local.write_file(folder / filenames.MANIFEST, joined_manifest.dumps())
    local.sync_folder(folder)
