"""A folder that is there whole or not at all, and work on it that can be continued.

.NAME.partial/    beside the output, while it is made
  plan.json         what is being made; another plan's leftovers are thrown away
  written.jsonl     which shards were whole and on disk, and what was proven of the source
  *.partial         a shard in the making
  model-...         shards that are whole; the same command continues after them
NAME/             the same folder, renamed when everything in it is whole; what it replaces changes
                  places with it at once, and goes by way of .NAME.trash
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, NamedTuple

from ckpt.folders.filenames import LOGBOOK, PLAN
from ckpt.folders.replacing import is_arriving, replace_folder
from converters.errors import CheckpointError
from converters.options import OUTPUT, OVERWRITE
from converters.plan import Plan
from converters.storage import local, misplaced_files
from converters.storage.local_store import LOCAL
from converters.storage.system import flock
from converters.words import counted, verb

_ALTERNATIVE: ContextVar[str | None] = ContextVar("alternative", default=None)


def another_folder() -> str:
    """The remedy where an output does not fit:
    another folder, unless ``without_choice``."""
    return _ALTERNATIVE.get() or f"choose another folder with {OUTPUT}"


@contextmanager
def without_choice(alternative: str) -> Iterator[None]:
    """Where the user cannot name another folder: what to do instead,
    as words after "or"."""
    token = _ALTERNATIVE.set(alternative)
    try:
        yield
    finally:
        _ALTERNATIVE.reset(token)


class Continuation(NamedTuple):
    """The shards that an interrupted run of the same plan left whole, of how many."""

    present: int
    total: int

    @property
    def sentence(self) -> str:
        """How many are there."""
        are_verb = verb(self.present, "is", "are")
        return f"{self.present:,} of {counted(self.total, 'shard')} {are_verb} there"


def continuation(output: Path, plan: Plan) -> Continuation | None:
    """The shards that the same plan would go on with at ``output``;
    ``None`` if it starts over."""
    if not output.name:
        return None  # where no folder can be made

    folder = folder_for(output)
    try:
        if not folder.is_dir() or (folder / PLAN).read_bytes() != plan.digest().encode():
            return None
        sizes = [(folder / shard.filename, shard.nbytes) for shard in plan.shards]
        present = sum(path.is_file() and path.stat().st_size == size for path, size in sizes)
    except OSError:
        return None

    return Continuation(present, len(plan.shards)) if present else None


def folder_for(output: Path) -> Path:
    """Where the output is made until it is whole."""
    return output.with_name(f".{output.name}.partial")


def require_place(
    output: Path,
    protected_folders: Sequence[Path],
    overwrite: bool,
) -> None:
    """Raises ``CheckpointError`` unless a folder may be made at ``output``.

    At none of the ``protected_folders`` it may.
    """
    if not output.name:
        raise CheckpointError(
            f"{output} cannot be the name of a folder; name another with {OUTPUT}",
            "output",
        )
    if output.resolve() in protected_folders:
        raise CheckpointError(
            f"{output} holds the checkpoint itself; name another folder with {OUTPUT}",
            "output",
        )

    if output.is_symlink() or output.is_file() or os.path.ismount(output):
        raise CheckpointError(
            f"{output} is a file, a link or a mount point; name a new folder with {OUTPUT}",
            "output",
        )

    _require_nobodys_place(output)
    overwrite = overwrite or is_arriving(output)  # what a crash of this command left
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{output} exists already; {OVERWRITE} replaces it, {OUTPUT} names another folder",
            "output",
        )


def _require_nobodys_place(output: Path) -> None:
    """``CheckpointError`` where somebody works:
    in the working directory, or a git work tree."""
    place = output.resolve()
    working_directory = Path.cwd().resolve()
    if place == working_directory or place in working_directory.parents:
        relation = "is" if place == working_directory else "holds"
        raise CheckpointError(
            f"{output} {relation} the working directory, which the output would replace; name "
            f"a folder inside of it with {OUTPUT}",
            "output",
        )

    if os.path.lexists(output / ".git"):
        raise CheckpointError(
            f"{output} is a git work tree, which the output would replace; name another folder "
            f"with {OUTPUT}",
            "output",
        )


def require_makeable(output: Path, needed_bytes: int, alternative: str | None = None) -> None:
    """Raises ``CheckpointError`` where ``output`` could not be made, and makes nothing.

    A dry run asks this; whoever makes the output is told by the system. ``needed_bytes``
    are those of the output. Too little room is no error here, as room can be made, and
    the dry run tells (``shortage``); a filesystem without any, such as /proc, is one.
    """
    parent = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problem = "may not be written to" if parent.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{parent} {problem}, so {output} cannot be made; {alternative or another_folder()}",
            "output",
        )

    if not local.free_space(output):
        require_room(folder_for(output), needed_bytes, alternative)


def require_file_place(output: Path, overwrite: bool) -> None:
    """Raises ``CheckpointError`` unless a file may be made at ``output``."""
    if output.is_dir():
        raise CheckpointError(
            f"{output} is a folder, and a file is to be written there; name another with {OUTPUT}",
            "output",
        )

    if os.path.lexists(output) and not (overwrite and output.is_file()):
        raise CheckpointError(
            f"{output} exists already; {OVERWRITE} replaces it, {OUTPUT} names another file",
            "output",
        )


def folder_of_file(output: Path) -> Path:
    """The folder in which the one file ``output`` is made (``take_file``)."""
    return output.with_name(f".{output.name}.made")


def take_file(made_file: Path, output: Path) -> None:
    """Moves a file that is whole and on disk to its place;
    the folder that it was made in goes."""
    LOCAL.replace(made_file, output)
    shutil.rmtree(made_file.parent, ignore_errors=True)


@contextmanager
def as_output_error(output: Path) -> Iterator[None]:
    """Turns an error of the system,
    while ``output`` is made, into a ``CheckpointError``."""
    try:
        yield
    except OSError as error:
        advice = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = f"{error.filename or output}: {error.strerror}"
        if lost_link := misplaced_files.link(output).removeprefix("; "):
            reason = f"{output} cannot be made: {lost_link}"
        raise CheckpointError(
            f"{reason}; {advice}{another_folder()}",
            "output",
        ) from error


@contextmanager
def staged(output: Path, plan: Plan, needed_bytes: int) -> Iterator[Path]:
    """The folder to write into,
    which becomes ``output`` when the block ends without an error.

    It is locked, and empty or with whole shards of the same plan; ``needed_bytes`` in
    all will be needed. It stays behind only where the same command can go on: after an
    interruption or a failing disk, and with a whole shard in it. ``CheckpointError`` if
    it is in use or the disk too small.
    """
    folder = folder_for(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / PLAN, "a+b") as plan_file:
        lock(plan_file, output)
        try:
            _clear_of_others(folder, plan_file, plan)
            if not flock.OFFERED:
                plan_file.close()  # or it could not be removed, nor its folder renamed

            require_room(folder, needed_bytes, another_folder())
            yield folder
            commit(folder, output, (LOGBOOK,))
        except BaseException as error:
            if is_final(error) or not _has_shard(folder, plan):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def commit(folder: Path, output: Path, leftovers: Iterable[str]) -> None:
    """Gives a staging folder that is whole its name, without the files of the work on it."""
    for name in leftovers:
        (folder / name).unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)
    LOCAL.sync(folder)
    replace_folder(folder, output)


def is_final(error: BaseException) -> bool:
    """Whether an error says that the same command would fail again, so that nothing of it
    is of use."""
    return isinstance(error, CheckpointError) and error.kind != "output"


def lock(plan_file: IO[bytes], output: Path) -> None:
    """Keeps others from the folder;
    ``CheckpointError`` if another conversion is at work."""
    try:
        flock.take(plan_file.fileno())
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder_for(output)} is in use: another conversion writes {output}", "output"
        ) from error
    except OSError:
        pass  # a filesystem without locks


def _clear_of_others(folder: Path, plan_file: IO[bytes], plan: Plan) -> None:
    """Removes what is not of this plan, whose digest is in ``plan_file`` then."""
    digest = plan.digest().encode()
    plan_file.seek(0)
    with local.naming_path(folder / PLAN):
        is_same_plan = plan_file.read() == digest
    if is_same_plan:
        clear(folder, {LOGBOOK, *(shard.filename for shard in plan.shards)})
        return

    clear(folder, set())
    enter_plan(folder, plan_file, digest)


def enter_plan(folder: Path, plan_file: IO[bytes], text: bytes) -> None:
    """Says what is made in a staging folder now."""
    with local.naming_path(folder / PLAN):
        # a file's own truncate ends at EINTR
        os.ftruncate(plan_file.fileno(), 0)
        plan_file.write(text)
        plan_file.flush()


def _has_shard(folder: Path, plan: Plan) -> bool:
    return any((folder / shard.filename).exists() for shard in plan.shards)


def clear(folder: Path, kept_shards: Collection[str]) -> None:
    """Removes all but these shards:
    what else an interrupted run left may be of any content."""
    for parent, subfolders, filenames in os.walk(folder, topdown=False):
        for name in filenames:
            path = Path(parent, name)
            if path.relative_to(folder).as_posix() not in (*kept_shards, PLAN):
                path.unlink()

        for name in subfolders:
            path = Path(parent, name)
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def require_room(folder: Path, needed_bytes: int, alternative: str | None) -> None:
    """``CheckpointError`` unless ``needed_bytes`` fit on the disk; as ``shortage``."""
    reason = shortage(folder, needed_bytes, alternative)
    if reason is not None:
        raise CheckpointError(reason, "output")


def shortage(folder: Path, needed_bytes: int, alternative: str | None = None) -> str | None:
    """Why ``needed_bytes`` do not fit on the disk, as a sentence; ``None`` if they do.

    Those that are in ``folder`` are counted. ``alternative`` says what to do where no
    room can be made.
    """
    paths = (path for path in folder.rglob("*") if path.name not in (PLAN, LOGBOOK))
    present_files = [path for path in paths if path.is_file()]
    present_bytes = sum(path.stat().st_size for path in present_files)
    free_bytes = local.free_space(folder)
    if needed_bytes - present_bytes <= free_bytes:
        return None
    return (
        f"{folder.parent} has {free_bytes:,} bytes free, the output needs "
        f"{needed_bytes - present_bytes:,}; make room or {alternative or another_folder()}"
    )
