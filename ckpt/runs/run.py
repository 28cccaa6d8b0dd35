"""The checkpoints of a run's folder,
which of them are committed, and the pointers to them.

out/
  latest                 "checkpoint-500/global_step500": folder and tag, so that ``out`` is a
  best                   save_dir for DeepSpeed too; "checkpoint-500" for weights only
  checkpoint-500/        any name; committed or not is told by its manifest alone
  .anything              never a checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.runs import manifest as manifests
from ckpt.runs.ancestry import Ancestry
from ckpt.runs.checkpoint_folder import (
    RunCheckpoint,
    bytes_under,
    open_checkpoint,
    order,
    require_read,
)
from ckpt.runs.recognition import is_checkpoint, is_folder, is_numbered, is_run, step_in
from converters.detect import detect
from converters.errors import CheckpointError
from converters.storage import local
from converters.storage.store import Name, local_path
from converters.words import shell_word

if TYPE_CHECKING:
    from ckpt.runs.lineage import Line

__all__ = [
    "POINTERS",
    "Run",
    "RunCheckpoint",
    "bytes_under",
    "derived",
    "is_checkpoint",
    "is_numbered",
    "is_run",
    "leading",
    "members",
    "numbered",
    "of_line",
    "open_checkpoint",
    "order",
    "original_of",
    "require_read",
    "step_in",
    "without_derived",
]
POINTERS = ("latest", "best")


@dataclass(frozen=True, slots=True, init=False)
class Run:
    """A folder that checkpoints are saved into; ``path`` may be given as text."""

    path: Path

    def __init__(self, path: Name):
        object.__setattr__(self, "path", local_path(path))

    def checkpoints(self) -> list[RunCheckpoint]:
        """All checkpoints, committed or not,
        in ``order``; ``CheckpointError`` without a folder.

        Every folder that does not begin with a dot and has a manifest, is called
        checkpoint-N, or holds the state files of DeepSpeed.
        """
        try:
            paths = [Path(entry.path) for entry in os.scandir(self.path)]
            folders = [path for path in paths if is_folder(path)]  # nor a link in a circle
        except (FileNotFoundError, NotADirectoryError) as error:
            raise detect(self.path).unlike("a run of DeepSpeed checkpoints") from error
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {error.strerror}; expected the folder of a run",
                "incomplete",
            ) from error

        checkpoints = []
        for folder in filter(is_checkpoint, folders):
            try:
                checkpoints.append(open_checkpoint(folder))
            except CheckpointError:
                if folder.is_dir():  # or else it was deleted while we looked
                    raise

        return sorted(checkpoints, key=order)

    def newest(self, tier: str | None = "full") -> RunCheckpoint | None:
        """The committed checkpoint of the highest step
        in the line that saved last (``lineage``).

        ``tier=None`` takes any. What was made of another one that is here does not
        count. Looks at sizes only.
        """
        checkpoints = self.checkpoints()
        ordered = without_derived(members(checkpoints), checkpoints)
        return next(
            (checkpoint for checkpoint in reversed(ordered) if tier in (None, checkpoint.tier)),
            None,
        )

    def target(self, name: str = "latest") -> str | None:
        """The text of a pointer; ``None`` if there is no such file.

        Of somebody's own link to a checkpoint of the run that is its name.
        """
        try:
            with open(self.path / name, "rb") as stream, local.naming_path(self.path / name):
                return stream.read(4096).decode("utf-8", "surrogateescape").strip()
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            target = (self.path / name).resolve()
            is_here = target.parent == self.path.resolve() and target.name != name
            return target.name if is_here else None

    def pointer(self, name: str = "latest") -> RunCheckpoint | None:
        """The checkpoint that ``latest`` or ``best`` names, committed or not.

        ``None`` if there is no such file, or it names no checkpoint here, or no tag in
        it.
        """
        pointer_text = self.target(name)
        if not pointer_text or not manifests.is_inside(pointer_text):
            return None

        folder_name, _, tag_name = pointer_text.partition("/")
        folder = self.path / folder_name
        if folder_name.startswith(".") or not folder.is_dir():
            return None
        if not is_checkpoint(folder):
            return None

        if tag_name and not (folder / tag_name).is_dir():
            return None

        return open_checkpoint(folder)

    def point(self, name: str, checkpoint: RunCheckpoint | None) -> None:
        """Makes ``latest`` or ``best`` name a committed checkpoint,
        durably; ``None`` removes it.

        ``CheckpointError`` for one that is not committed.
        """
        if name not in POINTERS:
            raise ValueError(f"{name!r} is not a pointer; expected latest or best")

        pointer_path = self.path / name
        if checkpoint is not None:
            self.require_committed(name, checkpoint)
        if checkpoint is None:
            pointer_path.unlink(missing_ok=True)
        elif pointer_path.is_dir() and not pointer_path.is_symlink():
            raise CheckpointError(
                f"{pointer_path} is a folder, where the file is to be that names "
                f"{checkpoint.name}; give it another name",
                "refused",
            )
        elif self.target(name) == checkpoint.pointer and not pointer_path.is_dir():
            return
        else:
            local.write_file(
                pointer_path,
                checkpoint.pointer.encode("utf-8", "surrogateescape"),
            )

        local.sync_folder(self.path)

    def require_committed(self, name: str, checkpoint: RunCheckpoint) -> None:
        """``CheckpointError`` where a pointer may not name the checkpoint."""
        if checkpoint.why is None:
            return

        raise CheckpointError(
            f"{checkpoint.folder} is not committed ({checkpoint.why}); {name} stays as it is",
            "refused",
        )

    def find(self, which: str) -> RunCheckpoint:
        """The checkpoint meant by ``latest``, ``best``, a step or a folder's name.

        Of one step, not what was made of the other, and rather checkpoint-N than a copy
        under another name. ``CheckpointError`` if there is none, or several of that
        step.
        """
        if which in POINTERS:
            if (pointed_checkpoint := self.pointer(which)) is not None:
                return pointed_checkpoint
            text = self.target(which)
            finding = f"names {text!r}, which is no checkpoint here" if text else "is empty"
            run = shell_word(self.path)
            command = f"ckpt latest {run} --set NAME"
            if which == "best":
                command = f"ckpt latest {run} --best --set NAME"
            raise CheckpointError(
                f"{self.path / which} {'does not exist' if text is None else finding}; "
                f"{command} makes it name a checkpoint",
                "incomplete",
            )

        checkpoints = self.checkpoints()
        matching = [
            checkpoint
            for checkpoint in checkpoints
            if which in (checkpoint.name, str(checkpoint.step))
        ]
        if len(matching) > 1:
            matching = numbered(without_derived(matching, checkpoints))
        if len(matching) != 1:
            finding = (
                "no checkpoint"
                if not matching
                else ", ".join(checkpoint.name for checkpoint in matching)
            )
            raise CheckpointError(
                f"{self.path} has {finding} for {which}; name one",
                "incomplete",
            )

        return matching[0]


def members(
    checkpoints: Iterable[RunCheckpoint],
    line: Line | None = None,
) -> list[RunCheckpoint]:
    """The committed checkpoints of a line, in ``order``; as ``of_line``."""
    line_checkpoints = of_line(checkpoints, line)

    return [checkpoint for checkpoint in line_checkpoints if checkpoint.committed]


def of_line(
    checkpoints: Iterable[RunCheckpoint],
    line: Line | None = None,
) -> list[RunCheckpoint]:
    """The checkpoints with a manifest of ``line``,
    or of the line that saved last, in ``order``.

    Give it all checkpoints of a folder: one that was damaged since still tells who
    saved last.
    """
    from ckpt.runs import lineage

    with_manifest = [checkpoint for checkpoint in checkpoints if checkpoint.manifest is not None]
    line = line or lineage.current(
        checkpoint.manifest for checkpoint in with_manifest if checkpoint.manifest
    )

    return sorted(
        (
            checkpoint
            for checkpoint in with_manifest
            if line and checkpoint.manifest and line.has(checkpoint.manifest)
        ),
        key=order,
    )


def leading(
    checkpoints: Iterable[RunCheckpoint],
    line: Line | None = None,
) -> RunCheckpoint | None:
    """The checkpoint that ``latest`` names:
    the newest full one of a line, or its newest.

    What was made of another one that is here does not count. As ``members``: give it
    all checkpoints of a folder.
    """
    present = list(checkpoints)
    ordered = without_derived(members(present, line), present)
    resumable = [checkpoint for checkpoint in ordered if checkpoint.tier == "full"]

    return next(reversed(resumable or ordered), None)


def without_derived(
    checkpoints: Iterable[RunCheckpoint],
    present: Iterable[RunCheckpoint],
) -> list[RunCheckpoint]:
    """The checkpoints that were not made of another one that is ``present``.

    Such a one stands beside its original, and is never taken in its place. Where the
    original is gone, or cannot be used any more, it counts like any other.
    """
    derived_folders = {checkpoint.folder for checkpoint in derived(present)}
    return [checkpoint for checkpoint in checkpoints if checkpoint.folder not in derived_folders]


def numbered(checkpoints: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """Those that are called checkpoint-N; all of them if none is."""
    numbered_ones = [checkpoint for checkpoint in checkpoints if is_numbered(checkpoint.folder)]
    return numbered_ones or list(checkpoints)


def derived(present: Iterable[RunCheckpoint]) -> list[RunCheckpoint]:
    """The checkpoints that were made of another one of these."""
    checkpoints = list(present)
    return [
        checkpoint for checkpoint in checkpoints if original_of(checkpoint, checkpoints) is not None
    ]


def original_of(
    checkpoint: RunCheckpoint, present: Iterable[RunCheckpoint]
) -> RunCheckpoint | None:
    """The checkpoint that another was made of, if it is ``present`` and can be used.

    It may have another name by now. Of several, one of which was made of the other, that
    is the one that is nearest to what a training saved.
    """
    source = checkpoint.source
    if source is None or not source.is_rewriting:
        return None

    from ckpt.runs import renaming

    candidates = [candidate for candidate in present if candidate.folder != checkpoint.folder]
    saved = [candidate for candidate in candidates if not _is_rewritten(candidate)]
    choices = [(source, saved), *((parent, candidates) for parent in reversed([*source.parents]))]
    original = next(
        (
            candidate
            for ancestor, group in choices
            for candidate in group
            if _is_original(candidate, checkpoint, ancestor)
        ),
        None,
    )

    return original or renaming.source_of(checkpoint, source, candidates)


def _is_rewritten(checkpoint: RunCheckpoint) -> bool:
    """Whether it was made of another checkpoint."""
    return checkpoint.source is not None and checkpoint.source.is_rewriting


def _is_original(candidate: RunCheckpoint, checkpoint: RunCheckpoint, source: Ancestry) -> bool:
    """Whether ``checkpoint`` was made of ``candidate``, which has all that it has.

    A save is told by its id, whatever its folder is called; one without a manifest by
    its name and step.
    """
    if source.save is not None:
        is_same = candidate.manifest is not None and candidate.manifest.save == source.save
        has_state = candidate.tier in ("full", checkpoint.tier)
        return is_same and candidate.committed and has_state

    if candidate.name != source.name:
        return False
    if candidate.manifest is not None:  # it was adopted since
        return candidate.committed and candidate.step == source.step
    return candidate.why == manifests.ABSENT
