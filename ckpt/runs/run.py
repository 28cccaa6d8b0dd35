"""The checkpoints of a run's folder, which of them are committed, and the pointers to them.

out/
  latest                 "checkpoint-500/global_step500": folder and tag, so that ``out`` is a
  best                   save_dir for DeepSpeed too; "checkpoint-500" for weights only
  checkpoint-500/        any name; committed or not is told by its manifest alone
  .anything              never a checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.runs import lineage
from ckpt.runs import manifest as manifests
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_checkpoint, is_numbered, is_run, is_spare, step_in
from converters import files
from converters.errors import CheckpointError

__all__ = [
    "POINTERS",
    "Checkpoint",
    "Run",
    "bytes_under",
    "is_checkpoint",
    "is_numbered",
    "is_run",
    "leading",
    "members",
    "of_line",
    "open_checkpoint",
    "order",
    "require_checkpoint",
    "require_read",
    "spelt",
    "step_in",
]
POINTERS = ("latest", "best")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of a run. ``why`` says why it is not committed, and is ``None`` if it is.

    ``step`` of one without a manifest is what its name says, if anything. ``deleted`` are files
    that the manifest lists and that are gone: if no resume needs them (the weights of a full
    checkpoint), it is committed all the same.
    """

    folder: Path
    step: int | None
    manifest: Manifest | None
    why: str | None
    pinned: bool
    deleted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def committed(self) -> bool:
        """Whether the manifest is there, is valid, and every file that it lists has its size."""
        return self.why is None

    @property
    def original(self) -> bool:
        """Whether it lies where it was saved, under its own name; no copy by hand, and no link."""
        own = self.manifest.name if self.manifest is not None else None
        return not self.folder.is_symlink() and own in (None, self.folder.name)

    @property
    def lacks(self) -> str | None:
        """What was deleted from it by hand though it is committed, as a line."""
        return f"lacks {_listed(self.deleted)}" if self.committed and self.deleted else None

    @property
    def thinned(self) -> bool:
        """Whether it was committed, and files were deleted from it that a resume needs.

        Nothing else is wrong with it, so that it counts among what retention may delete.
        """
        return self.why is not None and self.manifest is not None and bool(self.deleted)

    @property
    def tier(self) -> str | None:
        """``full`` (training can go on from it) or ``weights``; ``None`` without a manifest."""
        return self.manifest.tier if self.manifest else None

    @property
    def unusable(self) -> str | None:
        """Why training cannot go on from it, as far as its manifest tells; ``None`` if it can."""
        if self.why is None and self.tier != "full":
            return "weights only; training cannot go on from it"
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
        """What ``latest`` holds when it names this checkpoint."""
        tag = self.manifest.tag if self.manifest and self.manifest.tier == "full" else None
        return f"{self.name}/{tag}" if tag else self.name


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a folder is, by its manifest and the sizes of its files; reads no other bytes.

    ``CheckpointError`` if there is no such folder, or the disk or network fails: whether it is
    committed cannot be told then, and nothing may be decided by it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; expected the folder of a checkpoint", "incomplete")
    pinned = os.path.exists(folder / manifests.PINNED)
    why: str | None
    try:
        held = manifests.read(folder)
    except CheckpointError as error:
        require_read(error)
        absent = error.kind == "incomplete"
        why = manifests.ABSENT if absent else str(error).removeprefix(f"{folder}/")
        return Checkpoint(folder, step_in(folder.name), None, why, pinned)
    wrong = manifests.check(folder, held, strict=True)
    gone = tuple(line.removesuffix(_MISSING) for line in wrong if line.endswith(_MISSING))
    only_gone = len(gone) == len(wrong)
    if held.tier == "full":
        spared = {f"{name}{_MISSING}" for name in gone if is_spare(name)}
        wrong = [line for line in wrong if line not in spared]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    why = f"manifest.json lists {wrong[0]}{more}" if wrong else None
    return Checkpoint(folder, held.step, held, why, pinned, gone if only_gone or not wrong else ())


_MISSING = ": missing"  # as ``digests.unlike`` says it


def _listed(names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def require_read(error: CheckpointError) -> None:
    """Raises ``error`` if it came of a disk or network that fails, not of what lies there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in manifests.FAILING:
            raise error
        cause = cause.__cause__


def bytes_under(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile is not counted."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total


@dataclass(frozen=True, slots=True)
class Run:
    """A folder that checkpoints are saved into."""

    path: Path

    def checkpoints(self) -> list[Checkpoint]:
        """Committed or not, as ``order`` has them; ``CheckpointError`` without such a folder.

        Every folder that does not begin with a dot and has a manifest, is called checkpoint-N, or
        holds the state files of DeepSpeed.
        """
        try:
            entries = [Path(entry.path) for entry in os.scandir(self.path) if entry.is_dir()]
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {error.strerror}; expected the folder of a run", "incomplete"
            ) from error
        found = []
        for folder in filter(is_checkpoint, entries):
            try:
                found.append(open_checkpoint(folder))
            except CheckpointError:
                if folder.is_dir():  # or else it was deleted while we looked
                    raise
        return sorted(found, key=order)

    def newest(self, tier: str | None = "full") -> Checkpoint | None:
        """The committed one of the highest step in the line that saved last (``lineage``).

        ``tier=None`` takes any. Looks at sizes only.
        """
        ordered = members(self.checkpoints())
        return next((c for c in reversed(ordered) if tier in (None, c.tier)), None)

    def target(self, name: str = "latest") -> str | None:
        """The text of a pointer; ``None`` if there is no such file."""
        try:
            with open(self.path / name, "rb") as file, files.named(self.path / name):
                return file.read(4096).decode("utf-8", "surrogateescape").strip()
        except (FileNotFoundError, IsADirectoryError):
            return None

    def pointer(self, name: str = "latest") -> Checkpoint | None:
        """The checkpoint that ``latest`` or ``best`` names, committed or not.

        ``None`` if there is no such file, or it names no checkpoint here, or no tag in it.
        """
        text = self.target(name)
        if not text or not manifests.is_inside(text):
            return None
        first, _, tag = text.partition("/")
        folder = self.path / first
        if first.startswith(".") or not folder.is_dir() or not is_checkpoint(folder):
            return None
        return open_checkpoint(folder) if not tag or (folder / tag).is_dir() else None

    def point(self, name: str, checkpoint: Checkpoint | None) -> None:
        """Makes ``latest`` or ``best`` name a committed checkpoint, durably; ``None`` removes it.

        ``CheckpointError`` for one that is not committed.
        """
        if name not in POINTERS:
            raise ValueError(f"{name!r} is no pointer; expected latest or best")
        path = self.path / name
        if checkpoint is None:
            path.unlink(missing_ok=True)
        elif checkpoint.why is not None:
            raise CheckpointError(
                f"{checkpoint.folder} is not committed ({checkpoint.why}); {name} stays as it is",
                "refused",
            )
        elif self.target(name) == checkpoint.pointer:
            return
        else:
            files.write_file(path, checkpoint.pointer.encode("utf-8", "surrogateescape"))
        files.sync_folder(self.path)

    def find(self, which: str) -> Checkpoint:
        """The checkpoint meant by ``latest``, ``best``, a step or a folder's name.

        ``CheckpointError`` if there is none, or several of that step.
        """
        if which in POINTERS:
            if (found := self.pointer(which)) is not None:
                return found
            raise CheckpointError(f"{self.path / which} names no checkpoint", "incomplete")
        named = [c for c in self.checkpoints() if which in (c.name, str(c.step))]
        if len(named) != 1:
            what = "no checkpoint" if not named else ", ".join(c.name for c in named)
            raise CheckpointError(f"{self.path} has {what} for {which}; name one", "incomplete")
        return named[0]


def members(checkpoints: Iterable[Checkpoint], line: Line | None = None) -> list[Checkpoint]:
    """The committed ones of a line, in ``order``; as ``of_line``."""
    return [checkpoint for checkpoint in of_line(checkpoints, line) if checkpoint.committed]


def of_line(checkpoints: Iterable[Checkpoint], line: Line | None = None) -> list[Checkpoint]:
    """Those with a manifest of a line, in ``order``; without one, of the line that saved last.

    Give it all checkpoints of a folder: one that was damaged since still tells who saved last.
    """
    recorded = [c for c in checkpoints if c.manifest is not None]
    line = line or lineage.current(c.manifest for c in recorded if c.manifest)

    return sorted((c for c in recorded if line and c.manifest and line.has(c.manifest)), key=order)


def leading(checkpoints: Iterable[Checkpoint], line: Line | None = None) -> Checkpoint | None:
    """What ``latest`` names: the newest full one of a line, else the newest of it.

    As ``members``: give it all checkpoints of a folder.
    """
    ordered = members(checkpoints, line)
    full = [checkpoint for checkpoint in ordered if checkpoint.tier == "full"]

    return next(reversed(full or ordered), None)


def order(checkpoint: Checkpoint) -> tuple[int, bool, float, bool, str]:
    """The order of checkpoints: by step (unknown ones first), then the time of saving, then name.

    Times of change play no part: copying a run must not reorder it. Of one step, a copy by hand and
    a link come before what they are of, and a name without a number before a numbered one.
    """
    step = -1 if checkpoint.step is None else checkpoint.step
    created = checkpoint.manifest.created if checkpoint.manifest else 0.0
    return step, checkpoint.original, created, is_numbered(checkpoint.folder), checkpoint.name


def require_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; ``CheckpointError`` if it is none."""
    folder = spelt(folder)
    if folder.is_dir() and not is_checkpoint(folder):
        raise CheckpointError(
            f"{folder} holds no checkpoint; expected a folder such as out/checkpoint-500",
            "incomplete",
        )
    return open_checkpoint(folder)


def spelt(folder: Path) -> Path:
    """The path, which ends in the folder's name even where that of "." or ".." was given."""
    return Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
