"""Whether checkpoints are whole, whoever wrote them:
by names and headers, or by their bytes.

    plan      the state of each, and which bytes have checksums: all, or a sample of them
    execute   reads these bytes

``ckpt.runs.verify`` is what a manifest says; this adds what is proven without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ckpt.folders import locks
from ckpt.runs import manifest as manifests
from ckpt.runs import verify as by_manifest
from ckpt.runs.digests import MISSING, Progress, quiet
from ckpt.runs.foreign import intact_files, liveness, value_samples
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.states import checksums
from ckpt.runs.states.checksums import ChecksumPlan
from ckpt.runs.states.status import CheckpointStatus
from ckpt.text import size
from converters import detect
from converters.errors import CheckpointError, unreadable
from converters.execute import replicas
from converters.options import SAMPLE, SEED
from converters.source import Source
from converters.tensors import TensorRef
from converters.words import counted, shell_word, some, verb


@dataclass(frozen=True, slots=True)
class Depth:
    """How much is read: headers, with ``data`` every byte, or of these ``percent`` of
    the records and files, which ``seed`` chooses."""

    data: bool = False
    percent: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ValueError(f"{self.percent:g} is not a part in percent; expected 5%")

    @property
    def word(self) -> str:
        """The depth as ``--json`` has it: structure, sample or data."""
        if self.percent is not None:
            return "sample"
        return "data" if self.data else "structure"


@dataclass(frozen=True, slots=True)
class VerificationPlan:
    """A checkpoint and what is read of it; ``look`` is how its files were before."""

    status: CheckpointStatus
    depth: Depth
    checksums: ChecksumPlan | None = None
    look: liveness.Look | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that ``execute`` reads beside headers."""
        if self.checksums is not None:
            return self.checksums.nbytes
        manifest = self.status.checkpoint.manifest
        return manifest.nbytes if manifest is not None and self.depth.data else 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings: ``problems`` has a line for each thing that is not whole,
    ``proven`` on what is. ``bare_bytes`` are those that carry no checksum."""

    status: CheckpointStatus
    depth: Depth
    problems: tuple[str, ...]
    proven: tuple[str, ...]
    checked_bytes: int = 0
    bare_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether the checkpoint is committed or complete, and nothing is wrong with it."""
        return self.status.whole and not self.problems


def plans(
    statuses: Sequence[CheckpointStatus], depth: Depth, progress: Progress = quiet
) -> list[VerificationPlan]:
    """The plan of each checkpoint; ``progress`` gets 1 for each."""
    planned = []
    for status in statuses:
        planned.append(plan(status, depth))
        progress(1)

    return planned


def plan(status: CheckpointStatus, depth: Depth) -> VerificationPlan:
    """Decides which bytes of a checkpoint are read;
    ``CheckpointError`` where the disk fails."""
    folder, manifest = status.checkpoint.folder, status.checkpoint.manifest
    is_read = status.whole and depth.word != "structure"
    is_by_manifest = manifest is not None and depth.percent is None
    if not is_read or is_by_manifest:
        return VerificationPlan(status, depth)

    try:
        if manifest is not None:
            deleted = status.checkpoint.deleted
            checksum_plan, look = checksums.of_manifest(folder, manifest, deleted), None
        else:
            checksum_plan, look = checksums.of_files(folder), liveness.look(folder)
    except OSError as error:
        raise unreadable(error, folder) from error

    if depth.percent is not None:
        checksum_plan = checksum_plan.sample(depth.percent, depth.seed)

    return VerificationPlan(status, depth, checksum_plan, look)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is wrong with bytes that were read: how files differ from the manifest, by
    name, and lines on checksums."""

    differences: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def joined(self, reading: Reading) -> Reading:
        """This and what another process has read."""
        differences = {**self.differences, **reading.differences}
        return Reading(differences, (*self.problems, *reading.problems))


def read_part(
    planned: VerificationPlan, number: int, count: int, progress: Progress = quiet
) -> Reading:
    """Reads part ``number`` (from 1 on) of ``count``, of about equal bytes."""
    checkpoint = planned.status.checkpoint
    manifest, folder = checkpoint.manifest, checkpoint.folder
    with locks.reading(folder):
        if planned.checksums is not None:
            plan = planned.checksums.part(number, count)
            return Reading(problems=tuple(checksums.execute(plan, progress)))
        if manifest is None or planned.depth.word != "data":
            return Reading()

        begins = accumulate((file.size for file in manifest.files.values()), initial=0)
        total = max(sum(file.size for file in manifest.files.values()), 1)
        files = {
            name: file
            for (name, file), begin in zip(manifest.files.items(), begins, strict=False)
            if min(begin * count // total, count - 1) == number - 1
        }
        part = replace(manifest, files=files)
        return Reading(manifests.differences(folder, part, True, progress))


def execute(
    planned: VerificationPlan, progress: Progress = quiet, reading: Reading | None = None
) -> Verdict:
    """Reads what is planned, and says whether the checkpoint is whole.

    With a ``reading`` the bytes were read already, part by part.
    """
    status = planned.status
    if status.checkpoint.manifest is not None:
        return _by_manifest(planned, progress, reading)
    if not status.complete:
        return Verdict(status, planned.depth, (status.description,), ())

    return _complete(planned, progress, reading)


def _by_manifest(planned: VerificationPlan, progress: Progress, reading: Reading | None) -> Verdict:
    """By the manifest, committed or not: sizes and headers, and every byte or a sample."""
    status, depth, checkpoint = planned.status, planned.depth, planned.status.checkpoint
    is_all = depth.word == "data"
    differences = None if reading is None or not is_all else reading.differences
    verification = by_manifest.verify(checkpoint, is_all, progress, differences)
    problems, proven = [*verification.problems], [*verification.proven]
    if checkpoint.committed and verification.spared:
        proven = [*_spared_lines(checkpoint, verification.spared), *proven]
    checked_bytes = planned.nbytes
    if planned.checksums is not None:
        with locks.reading(checkpoint.folder):
            problems += _problems(planned.checksums, progress, reading)
        proven.append(_checked_line(planned.checksums, depth, bool(problems)))

    return Verdict(status, depth, tuple(problems), tuple(proven), checked_bytes)


def _spared_lines(checkpoint: RunCheckpoint, differences: Mapping[str, str]) -> list[str]:
    """That no resume needs these files, and the way on: what ``ckpt doctor --fix``
    records, and what it does not."""
    recordable_names = [name for name in differences if is_recordable(checkpoint, name)]
    other_names = [name for name in differences if name not in recordable_names]
    command = f"ckpt doctor {shell_word(checkpoint.folder.parent)} --fix"
    lines = []
    if recordable_names:
        are_missing = [differences[name] == MISSING for name in recordable_names]
        word = "deleted" if all(are_missing) else "changed"
        if any(are_missing) and not all(are_missing):
            word = "deleted or changed"
        lines.append(
            f"no resume needs what was {word}; {command} makes the manifest say what is there"
        )
    if other_names:
        object_word = verb(len(other_names), "it", "them")
        lines.append(
            f"no resume needs {some(other_names)}; bring {object_word} back, or delete "
            f"{object_word}, after which {command} takes {object_word} off the manifest"
        )

    return lines


def is_recordable(checkpoint: RunCheckpoint, name: str) -> bool:
    """Whether ``ckpt doctor --fix`` makes the manifest say of a file what it is now."""
    manifest = checkpoint.manifest
    if manifest is None or manifest.nodes > 1:
        return False
    if name in checkpoint.deleted:
        return True
    if intact_files.damage(checkpoint.folder, name) is not None:
        return False
    if name in checkpoint.changed:
        return True
    return by_manifest.may_be_edited(checkpoint.folder, name, manifest.files[name])


def _problems(
    checksum_plan: ChecksumPlan, progress: Progress, reading: Reading | None
) -> Sequence[str]:
    """Lines on what is not as its checksum says, read now unless it was read already."""
    return checksums.execute(checksum_plan, progress) if reading is None else reading.problems


def _complete(planned: VerificationPlan, progress: Progress, reading: Reading | None) -> Verdict:
    """By what its writer writes, and by the checksums that its files have themselves."""
    status, depth, folder = planned.status, planned.depth, planned.status.checkpoint.folder
    proven = [status.description]
    if status.tag is not None:
        line, _ = by_manifest.states(folder, status.tag)
        proven += [line] if line else []

    checksum_plan = planned.checksums
    if checksum_plan is None:
        return Verdict(status, depth, (), tuple(proven))

    problems = [*_problems(checksum_plan, progress, reading), *_unlike_values(status, depth)]
    if planned.look is not None and planned.look != liveness.look(folder):
        problems.append("it changed while it was read: somebody is writing it; try again later")

    proven.append(_checked_line(checksum_plan, depth, bool(problems)))
    if checksum_plan.bare:
        proven.append(_bare_line(checksum_plan, status.adoptable))

    return Verdict(
        status,
        depth,
        tuple(problems),
        tuple(proven),
        checksum_plan.nbytes,
        checksum_plan.bare_bytes,
    )


def _unlike_values(status: CheckpointStatus, depth: Depth) -> list[str]:
    """A line if the model file of DeepSpeed holds other values than its states or, where
    every byte is read, a rank others of what several have."""
    folder = status.checkpoint.folder
    try:
        source = detect.read(folder, status.tag) if status.tag is not None else None
        if source is not None:
            value_samples.require_same(source, value_samples.remedy_of(source, folder))
            if depth.word == "data":
                replicas.require_same(_tensors_of(source))
    except CheckpointError as error:
        return [str(error).replace(f"{folder}/", "")] if _is_finding(error) else []

    return []


def _is_finding(error: CheckpointError) -> bool:
    """Whether it says what is wrong with a checkpoint, not what is not read of it."""
    return error.kind not in ("unsupported", "refused")


def _tensors_of(source: Source) -> Iterable[tuple[str, TensorRef]]:
    """The tensors of a checkpoint whose ranks share some, the optimizer's states with them
    where these are read; none of another checkpoint."""
    if not any(tensor.replicas for tensor in source.weights.tensors.values()):
        return ()

    from converters.zero.merging import reader as merging  # which few checkpoints need
    from converters.zero.merging.checkpoint import MergedCheckpoint

    tensors: Iterable[tuple[str, TensorRef]] = source.weights.tensors.items()
    try:
        merged_checkpoint = merging.read(source.place.folder)
    except CheckpointError as error:
        if _is_finding(error):
            raise
        return tensors
    return (
        merged_checkpoint.tensors() if isinstance(merged_checkpoint, MergedCheckpoint) else tensors
    )


def _checked_line(checksum_plan: ChecksumPlan, depth: Depth, has_problems: bool) -> str:
    number = len(checksum_plan.checkables)
    subject = counted(number, "record or file")
    if number != 1:
        subject = f"{number:,} records and files"
    if depth.percent is not None:
        subject += f" of {checksum_plan.total:,} "
        subject += f"({SAMPLE(f'{depth.percent:g}%')} {SEED(depth.seed)})"

    finding = "were compared with their checksums"
    if not has_problems:
        finding = verb(number, "agrees with its checksum", "agree with their checksums")

    return f"{subject}, {size(checksum_plan.nbytes)}, {finding}"


def _bare_line(checksum_plan: ChecksumPlan, may_be_adopted: bool) -> str:
    names = some(entry.name for entry in checksum_plan.bare)
    way = ", which a manifest would add" if may_be_adopted else ""
    return f"{size(checksum_plan.bare_bytes)} have no checksum{way}: {names}"
