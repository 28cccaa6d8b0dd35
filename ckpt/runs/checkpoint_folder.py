"""A folder of a run that is taken for a checkpoint:
whether it is committed, or why not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.folders import filenames
from ckpt.runs import digests, engines
from ckpt.runs import manifest as manifests
from ckpt.runs.ancestry import Ancestry, Record, record_in
from ckpt.runs.conversions import WeightsOrigin, conversion_in
from ckpt.runs.digests import MISSING
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_numbered, is_spare, step_in
from converters.detect import detect
from converters.errors import CheckpointError
from converters.storage import local
from converters.words import first, shell_word
from converters.zero.files.discovery import is_tag_folder

WEIGHTS_ONLY = "weights only; training cannot go on from it"
SLIMMED = "weights only since it was slimmed; training cannot go on from it"


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A folder of a run. ``why`` says why it is not committed, and is ``None`` if it is.

    ``step`` of one without a manifest is what its name says, if anything. ``deleted``
    are files that the manifest lists and that are gone: if no resume needs them (the
    weights of a full checkpoint), it is still committed. So it is if such files were
    ``changed``, which are those that have another size. ``record`` says what one without
    a manifest was made of, if ckpt made it, and ``conversion`` the same of weights. One
    that ``is_overwritten`` has the manifest of an earlier save, which counts as none. Of
    one that ``is_unread`` nothing is known, because its disk fails or nobody may look
    into it.
    """

    folder: Path
    step: int | None
    manifest: Manifest | None
    why: str | None
    pinned: bool
    deleted: tuple[str, ...] = ()
    record: Record | None = None
    changed: tuple[str, ...] = ()
    conversion: WeightsOrigin | None = None
    is_overwritten: bool = False
    is_unread: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def committed(self) -> bool:
        """Whether the manifest is valid, and every file that it lists has its size."""
        return self.why is None

    @property
    def source(self) -> Ancestry | None:
        """The checkpoint that ckpt made it of; ``None`` if a training saved it."""
        if self.manifest is not None:
            return self.manifest.origin
        return self.record.source if self.record is not None else None

    @property
    def origin(self) -> str | None:
        """``source``, or ``conversion``, as words after its name."""
        if self.source is None:
            return self.conversion.sentence if self.conversion is not None else None
        return self.source.sentence

    @property
    def is_universal(self) -> bool:
        """Whether ckpt wrote it in the universal format, which never gets a manifest."""
        return self.source is not None and self.source.form == "universal"

    @property
    def original(self) -> bool:
        """Whether the checkpoint lies where it was saved, not as a copy or a link."""
        recorded_name = self.manifest.name if self.manifest is not None else None
        return not self.folder.is_symlink() and recorded_name in (None, self.folder.name)

    @property
    def lacks(self) -> str | None:
        """A line on what was deleted by hand from a committed checkpoint."""
        if not self.committed or not self.deleted:
            return None

        return f"lacks {first(self.deleted)}"

    @property
    def changes(self) -> str | None:
        """A line on what was changed by hand in a committed checkpoint."""
        if not self.committed or not self.changed:
            return None

        return f"changed since its save: {first(self.changed)}"

    @property
    def doubt(self) -> str | None:
        """A line on what speaks against one save in a committed checkpoint."""
        if not self.committed or self.manifest is None or self.manifest.doubt is None:
            return None

        return f"committed by ckpt doctor --adopt --one-save, though {self.manifest.doubt}"

    def spares(self, name: str) -> bool:
        """Whether no resume reads this file,
        so that the checkpoint stays committed without it."""
        return self.manifest is not None and is_spared(name, self.manifest)

    @property
    def thinned(self) -> bool:
        """Whether files that a resume needs were deleted from a committed checkpoint.

        Nothing else is wrong with it, so that it counts among what retention may delete.
        """
        return self.why is not None and self.manifest is not None and bool(self.deleted)

    @property
    def tier(self) -> str | None:
        """``full`` (training can go on from it) or ``weights``;
        ``None``: no manifest."""
        return self.manifest.tier if self.manifest else None

    @property
    def is_slimmed(self) -> bool:
        """Whether it was a full one, of which ``ckpt slim`` has kept the weights."""
        return self.tier == "weights" and self.source is not None and not self.source.is_rewriting

    @property
    def unusable(self) -> str | None:
        """Why training cannot go on from it, by its manifest; ``None`` if it can."""
        if self.why is None and self.tier != "full":
            return SLIMMED if self.is_slimmed else WEIGHTS_ONLY
        return self.why

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics by name, such as eval_loss."""
        return self.manifest.metrics if self.manifest else {}

    @property
    def nbytes(self) -> int:
        """Bytes of the files listed or, without a manifest, of those on disk."""
        return self.manifest.nbytes if self.manifest else bytes_under(self.folder)

    @property
    def pointer(self) -> str:
        """The content of ``latest`` when it names this checkpoint."""
        if self.manifest is None or self.manifest.tier != "full" or not self.manifest.tag:
            return self.name

        return f"{self.name}/{self.manifest.tag}"


def is_spared(name: str, manifest: Manifest) -> bool:
    """Whether no resume from a full checkpoint reads this file."""
    return manifest.tier == "full" and is_spare(name, manifest.tag is not None)


def order(checkpoint: RunCheckpoint) -> tuple[int, bool, bool, float, bool, str]:
    """The order of checkpoints:
    by step (unknown ones first), then the time of saving, then name.

    Times of change play no part: copying a run must not reorder it. Of one step, a copy
    by hand, a link and what was made of another one come before what they are of, and a
    name without a number before a numbered one.
    """
    step = -1 if checkpoint.step is None else checkpoint.step
    created = checkpoint.manifest.created if checkpoint.manifest else 0.0
    is_saved = checkpoint.source is None or not checkpoint.source.is_rewriting

    return (
        step,
        checkpoint.original,
        is_saved,
        created,
        is_numbered(checkpoint.folder),
        checkpoint.name,
    )


def open_checkpoint(folder: Path) -> RunCheckpoint:
    """Opens a folder, by its manifest and the sizes of its files; reads no other bytes.

    ``CheckpointError`` if there is no such folder, or the disk or network fails:
    whether it is committed cannot be told then, and nothing may be decided by it.
    """
    if not folder.is_dir():
        raise detect(folder).unlike("the folder of a checkpoint")

    pinned = os.path.exists(folder / filenames.PINNED)
    reason: str | None
    try:
        manifest = manifests.read(folder)
    except CheckpointError as error:
        require_read(error)
        is_absent = error.kind == "incomplete"
        reason = manifests.ABSENT if is_absent else str(error).removeprefix(f"{folder}/")
        record = record_in(folder) if is_absent else None
        conversion = conversion_in(folder) if is_absent and record is None else None
        recorded_step = record.source.step if record is not None else None
        if conversion is not None:
            recorded_step = conversion.step
        step = step_in(folder.name) if recorded_step is None else recorded_step
        return RunCheckpoint(
            folder, step, None, reason, pinned, record=record, conversion=conversion
        )

    return _compared(folder, manifest, pinned)


def unread(folder: Path, error: CheckpointError) -> RunCheckpoint:
    """A checkpoint, for a list, of which ``require_read`` has raised ``error``."""
    reason = f"cannot be read: {str(error).removeprefix(f'{folder}/')}"
    return RunCheckpoint(folder, step_in(folder.name), None, reason, False, is_unread=True)


def _compared(folder: Path, manifest: Manifest, pinned: bool) -> RunCheckpoint:
    """A checkpoint with a manifest, by the sizes of the files that the manifest lists.

    A manifest of which another save has overwritten every state file counts as none.
    """
    differences = manifests.differences(folder, manifest, strict=True)
    if is_saved_over(folder, manifest, bool(differences)):
        step = step_in(folder.name)
        return RunCheckpoint(folder, step, None, manifests.ABSENT, pinned, is_overwritten=True)

    missing_names = tuple(name for name, what in differences.items() if what == MISSING)
    changed_names = tuple(name for name in differences if name not in missing_names)
    problems = {
        name: f"{name}: {what}"
        for name, what in differences.items()
        if not is_spared(name, manifest)
    }
    is_only_missing = problems.keys() <= set(missing_names)
    reason = f"manifest.json lists {first(list(problems.values()))}" if problems else None
    if (later_finding := later_save(folder, manifest)) is not None:
        # nothing that retention may delete: it holds more than the manifest lists
        reason = f"{later_finding} (ckpt doctor {shell_word(folder.parent)} says what helps)"
        is_only_missing = False

    return RunCheckpoint(
        folder,
        manifest.step,
        manifest,
        reason,
        pinned,
        missing_names if is_only_missing else (),
        changed=changed_names,
    )


def is_saved_over(folder: Path, manifest: Manifest, is_different: bool) -> bool:
    """Whether another save has overwritten every state file of a committed checkpoint.

    A stock training that starts over in the folder of an older run saves over
    checkpoint-2, and leaves manifest.json, of which it knows nothing. So it says nothing
    of what lies there.

    ``is_different`` is whether any listed file has another size. Where none has, a look
    at the contents needs a reason: that all state files are newer than the manifest.
    Files that are damaged or missing, one by one, are no other save. Copying changes
    times, and no contents.
    """
    tags = tuple(f"{tag}/" for tag in engines.tags(manifest).values())
    paths = {
        folder / name: record
        for name, record in manifest.files.items()
        if record.kind == "zip" and name.startswith(tags)
    }
    if not paths or manifest.tier != "full":
        return False

    try:
        committed_at = (folder / filenames.MANIFEST).stat().st_mtime_ns
        if not is_different and any(path.stat().st_mtime_ns <= committed_at for path in paths):
            return False
        # the first file that is as it was answers
        return all(_has_other_contents(path, record.digest) for path, record in paths.items())
    except OSError:  # one is missing, or the disk fails, which is said elsewhere
        return False


def _has_other_contents(path: Path, digest: str) -> bool:
    """Whether a torch zip is whole by its directory, and has other records."""
    with open(path, "rb") as stream:
        directory = digests.directory_of(stream)

    return directory is not None and f"zip:{directory.digest}" != digest


def later_save(folder: Path, manifest: Manifest) -> str | None:
    """That something was saved into a committed checkpoint later,
    as words after its name."""
    tag_name = unlisted_tag(folder, manifest)
    if tag_name is None:
        return None
    return (
        f"latest names {tag_name}, which manifest.json does not list: something was saved into it "
        "after it was committed"
    )


def unlisted_tag(folder: Path, manifest: Manifest) -> str | None:
    """The tag that a later save made in a committed checkpoint: ``latest`` names it, and
    the manifest lists no file of it. ``None`` if there is none.

    DeepSpeed would load that one, which the manifest says nothing of.
    """
    if manifest.tier != "full" or manifest.tag is None:
        return None

    for pointer_name, tag_name in engines.pointers(manifest.tag, engines.names(manifest)).items():
        try:
            with (
                open(folder / pointer_name, "rb") as stream,
                local.naming_path(folder / pointer_name),
            ):
                text = stream.read(4096).decode("utf-8", "surrogateescape").strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue  # it is missing, which is said elsewhere

        if not text or text == tag_name or not manifests.is_inside(text):
            continue
        path = (folder / pointer_name).parent / text
        if not path.is_dir() or not is_tag_folder(path):
            continue
        prefix = f"{path.relative_to(folder).as_posix()}/"
        if not any(name.startswith(prefix) for name in manifest.files):
            return text

    return None


def require_read(error: CheckpointError) -> None:
    """Raises ``error`` if it came of a disk or network that fails,
    not of what lies there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in manifests.FAILING:
            raise error
        cause = cause.__cause__


def bytes_under(folder: Path) -> int:
    """Bytes of all files below a folder,
    or of a file; what vanishes meanwhile is not counted."""
    if folder.is_file():
        return folder.stat().st_size

    total_bytes = 0
    for parent, _, names in os.walk(folder):
        for file_name in names:
            try:
                total_bytes += os.lstat(os.path.join(parent, file_name)).st_size
            except OSError:
                continue

    return total_bytes
