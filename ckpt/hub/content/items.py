"""The files of a push,
by the name that each will have in the repository, and all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckpt.runs.digests import FileRecord, quiet, unlike
from converters.errors import CheckpointError
from converters.options import MAX_SHARD_SIZE
from converters.plan import Shard
from converters.storage.system.names import is_name

if TYPE_CHECKING:
    from ckpt.weights.conversion.task import Conversion

# huggingface_hub 2.4: ``HfApi.upload_file`` ("up to 50 GB"),
# ``constants.MAX_HTTP_DOWNLOAD_SIZE``; the other two from hf.co/docs/hub/storage-limits
# (files in a folder, files in a repository).
MAX_FILE_BYTES = 50_000_000_000
MAX_FILES_IN_FOLDER = 10_000
MAX_FILES = 100_000


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the repository.

    ``name`` is its posix path there, without ``path_in_repo``. ``source`` is a file as
    it is, bytes made here, or a shard of the plan, whose bytes are made while they are
    sent. ``expected`` is what the manifest says of a file. ``ValueError`` for a name
    that could leave the repository's folder, or that git keeps for itself.
    """

    name: str
    source: Path | bytes | Shard
    expected: FileRecord | None = None

    def __post_init__(self) -> None:
        if (fault := unfit(self.name)) is not None:
            raise ValueError(f"{self.name!r} {fault}")

    @property
    def nbytes(self) -> int:
        """Bytes of the file; ``CheckpointError`` if it is gone."""
        if isinstance(self.source, bytes):
            return len(self.source)
        if isinstance(self.source, Shard):
            return self.source.nbytes

        try:
            return self.source.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{self.source}: {error.strerror}",
                "incomplete",
            ) from error

    def require_whole(self, progress: Callable[[int], object] = quiet) -> None:
        """Reads the file against the manifest's digest;
        ``CheckpointError`` if a byte differs.

        Nothing to do for what the manifest does not list, and for a shard, which is
        proven while its bytes are made.
        """
        if isinstance(self.source, Path) and self.expected is not None:
            try:
                difference = unlike(self.source, self.expected, True, progress)
            except OSError as error:
                raise CheckpointError(
                    f"{self.source}: {error.strerror}",
                    "incomplete",
                ) from error

            if difference is not None:
                raise CheckpointError(
                    f"{self.source}: {difference}; it is not what was committed, "
                    "choose another checkpoint"
                )


@dataclass(frozen=True, slots=True)
class Contents:
    """The files to send, and what to say of them.

    ``conversion`` is ``None`` where nothing is converted. ``left_out`` are files of the
    checkpoint that stay here, each with why. ``warnings`` are lines for whoever pushes.
    ``facts`` are JSON for ``--json`` and the card. ``made_names`` are those of the
    items (the model card and its picture) that were made for this push: leave them all
    out where the repository has a README.md.
    """

    items: tuple[Item, ...]
    conversion: Conversion | None
    left_out: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    made_names: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(item.nbytes for item in self.items)


def unfit(name: str) -> str | None:
    """Why a file may not have this name in a repository; ``None`` if it may."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a plain path inside the repository"
    if "\\" in name or not name.isprintable():
        return "holds a backslash or characters that cannot be shown"
    if not all(is_name(part) for part in parts):
        return "cannot be the name of a file on this system"
    if any(part.lower().startswith(".git") or part == ".cache" for part in parts):
        return "is git's or the Hub client's own"
    if any(len(part.encode()) > 255 or part != part.strip() for part in parts):
        return "is too long, or begins or ends with a blank"

    return None


def require_fitting(items: Sequence[Item]) -> None:
    """``CheckpointError`` unless names are unique
    and the Hub takes so many and so large files."""
    repeated_names = [
        name for name, count in Counter(item.name for item in items).items() if count > 1
    ]
    if repeated_names:
        raise CheckpointError(
            f"{repeated_names[0]} stands twice among the files to send", "refused"
        )

    for item in items:
        if item.nbytes > MAX_FILE_BYTES:
            advice = (
                "a tensor is larger than the Hub takes"
                if isinstance(item.source, Shard) and len(item.source.placements) == 1
                else f"cut it with {MAX_SHARD_SIZE('5GB')}"
            )
            raise CheckpointError(
                f"{item.name} has {item.nbytes:,} bytes, a file on the Hub at most "
                f"{MAX_FILE_BYTES:,}; {advice}",
                "refused",
            )

    folders = Counter(str(PurePosixPath(item.name).parent) for item in items)
    for folder, count in folders.items():
        if count > MAX_FILES_IN_FOLDER:
            raise CheckpointError(
                f"{folder} has {count:,} files, a folder on the Hub at most "
                f"{MAX_FILES_IN_FOLDER:,}; take a larger {MAX_SHARD_SIZE}",
                "refused",
            )

    if len(items) > MAX_FILES:
        raise CheckpointError(
            f"{len(items):,} files, a repository on the Hub takes at most {MAX_FILES:,}; "
            f"take a larger {MAX_SHARD_SIZE}",
            "refused",
        )
