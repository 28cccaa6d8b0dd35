"""Whether a checkpoint is whole: by its manifest,
and by what its state files say themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.folders import locks
from ckpt.folders.filenames import MANIFEST
from ckpt.runs import engines
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import later_save
from ckpt.runs.digests import (
    LARGE,
    FileRecord,
    Progress,
    quiet,
    unlike_without_records,
)
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_spare, is_weights
from ckpt.runs.run import RunCheckpoint
from converters.errors import CheckpointError
from converters.words import counted

_SLACK = 2.0  # seconds that a clock, or a network, may be off


@dataclass(frozen=True, slots=True)
class Verification:
    """The findings. ``problems`` has a line for each thing that is not whole.

    ``proven`` are lines on what is. ``spared`` are files that no resume minds, and how
    they differ.
    """

    checkpoint: RunCheckpoint
    problems: tuple[str, ...]
    proven: tuple[str, ...]
    spared: Mapping[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the checkpoint is committed and nothing is wrong with it."""
        return not self.problems

    @property
    def hindrance(self) -> str | None:
        """The first problem that a resume minds:
        not weights that were deleted or changed."""
        spared_lines = [f"{name}: {difference}" for name, difference in self.spared.items()]
        return next((line for line in self.problems if line not in spared_lines), None)


def verify(
    checkpoint: RunCheckpoint,
    data: bool = False,
    progress: Progress = quiet,
    found_differences: Mapping[str, str] | None = None,
) -> Verification:
    """Checks every file's size, or with ``data`` every byte,
    and that the state files fit together.

    Without ``data`` what was written after the manifest is found, too. With
    ``found_differences`` others have read the bytes, and how files differ is known.

    Of a checkpoint without a manifest only the latter, and it never counts as whole.
    """
    manifest = checkpoint.manifest
    if manifest is None:
        proof, problem = states(checkpoint.folder)
        problems = [str(checkpoint.why), *([problem] if problem else [])]
        return Verification(checkpoint, tuple(problems), (proof,) if proof else ())

    with locks.reading(checkpoint.folder):
        differences = dict(found_differences or {})
        if found_differences is None:
            differences = manifests.differences(checkpoint.folder, manifest, data, progress)
        if not data:
            rewritten_files = changes_since_commit(checkpoint.folder, manifest)
            differences = {**rewritten_files, **differences}
        problems = [f"{name}: {what}" for name, what in differences.items()]
        if (later_finding := later_save(checkpoint.folder, manifest)) is not None:
            problems.insert(0, later_finding)
        spared_names = [name for name in differences if checkpoint.spares(name)]
        proven = []
        if not problems:
            finding = "every byte has its digest" if data else "every file has its size"
            proven = [f"{counted(len(manifest.files), 'file')}, {finding}"]

        proven += filter(None, [checkpoint.doubt])
        if manifest.tier == "full" and manifest.nodes == 1:
            for engine, tag_path in _places_of_states(checkpoint.folder, manifest).items():
                proof, problem = states(checkpoint.folder, tag_path)
                proven += [f"{engine}: {proof}" if engine else proof] if proof else []
                problems += [problem] if problem else []

    if manifest.nodes > 1:
        proven.append(part_of(manifest.node, manifest.nodes))

    spared = {name: differences[name] for name in spared_names}
    return Verification(checkpoint, tuple(problems), tuple(proven), spared)


def _places_of_states(folder: Path, manifest: Manifest) -> Mapping[str, str | None]:
    """The tag of each engine; without DeepSpeed the folder itself, where FSDP's parts
    lie in it.

    Of what others save without DeepSpeed the digests say all.
    """
    if manifest.tag is not None:
        return engines.tags(manifest)

    from converters.detect import detect, sharded

    return {"": None} if detect(folder).kind.name in sharded.READ else {}


def changes_since_commit(folder: Path, manifest: Manifest, within: str = "") -> dict[str, str]:
    """How the files differ that were written after the manifest,
    in a folder ``within``.

    Every torch zip is looked at, by its directory; another file only where its times are
    later than the manifest's, and then by all of its bytes. So times accuse nobody:
    after a copy, which changes them all, every file still has its digest. Weights that
    no resume needs are left out.
    """
    committed_at = _changed_at(folder / MANIFEST) + _SLACK
    is_deepspeeds = manifest.tag is not None or manifest.tier != "full"
    differences = {}
    for name, record in manifest.files.items():
        path = folder / name
        if is_spare(name, is_deepspeeds) or not name.startswith(within):
            continue
        try:
            if record.kind != "zip" and _changed_at(path) <= committed_at:
                continue
            difference = unlike_without_records(path, record)
        except OSError as error:
            difference = str(error.strerror)
        if difference is not None:
            differences[name] = difference

    return differences


def _changed_at(path: Path) -> float:
    """When a file or its inode was changed last, in seconds since 1970."""
    status = path.stat()
    return max(status.st_mtime, status.st_ctime)


def may_be_edited(folder: Path, name: str, file: FileRecord) -> bool:
    """Whether somebody may have edited a file without a change of its size: it is small,
    and newer than the manifest. Weights are not edited, but replaced by those of
    something else."""
    if file.size > LARGE or is_weights(name):
        return False
    try:
        return (folder / name).stat().st_mtime_ns > (folder / MANIFEST).stat().st_mtime_ns
    except OSError:
        return False


def states(folder: Path, tag: str | None = None) -> tuple[str | None, str | None]:
    """Lines on what the headers of DeepSpeed's files prove,
    and on what is wrong with them.

    What is not read here, such as pipeline parallelism, is said and counts as no fault.
    """
    from converters import detect
    from converters.detect import kinds

    try:
        source = detect.read(folder, tag, complete=True)
    except CheckpointError as error:
        if error.kind == "unsupported":
            return f"state files not checked: {error}", None
        return None, str(error)

    rank_count = counted(source.world_size, "rank")
    tensor_count = counted(len(source.weights.tensors), "tensor")
    kind_text = f"ZeRO stage {source.stage}" if source.stage else "no ZeRO"
    if source.stage is None:
        kind_text = kinds.BY_NAME[source.kind].title

    return f"state files complete: {kind_text}, {rank_count}, {tensor_count}", None


def part_of(node: int | None, nodes: int | None) -> str:
    """A line on a checkpoint that is one node's part of a save."""
    return f"the part of node {node} of {nodes}; ckpt collect joins them"
