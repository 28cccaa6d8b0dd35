"""The staging folder of an output that several processes make, each a share of it.

.NAME.partial/              beside the output
  plan.json                   what is being made, and in how many shares
  command.json                what each process was called with, but for its share
  NAME.cut                    a shard of which several processes write runs
  model-...                   shards that one process wrote whole
  share-3-of-16.json          the record of a share that is on disk; written last
  written-3-of-16.jsonl       its logbook, by which an interrupted share goes on
  .joined                     all are joined: what is above goes, and the folder gets its name

Whoever writes a share holds a shared lock of plan.json, and whoever joins the shares an
exclusive one, as a process does that makes an output alone.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import IO, Any, NamedTuple

from ckpt.folders import staging
from ckpt.folders.filenames import COMMAND, JOINED, PLAN
from converters.accessors import entry, value
from converters.errors import CheckpointError, MalformedError
from converters.execute import shares
from converters.execute.logbook import Logbook
from converters.execute.plan_shares import PlanShare
from converters.execute.shares import ShareRecord, ShareTask
from converters.options import SHARE
from converters.storage import bounded_json, local
from converters.storage.local_store import LOCAL
from converters.storage.system import flock, opening
from converters.words import counted, some

PATIENCE = 10.0  # seconds until a folder that another process looks through is called in use


class SharedCommand(NamedTuple):
    """What each process was called with, but for its share: arguments, working directory."""

    arguments: tuple[str, ...]
    folder: str


class ShareFolder(NamedTuple):
    """The folder that a share is written into. ``record`` is the one of an earlier run."""

    path: Path
    logbook: Logbook
    record: ShareRecord | None


@contextmanager
def writing(
    output: Path,
    task: ShareTask,
    share: PlanShare,
    needed_bytes: int,
    command: SharedCommand | None,
) -> Iterator[ShareFolder]:
    """The folder to write a share into, beside processes that write others.

    ``CheckpointError`` if something else is made there, if another process writes this
    very share, or if the disk is too small for the ``needed_bytes`` of the output.
    """
    folder = staging.folder_for(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / PLAN, "a+b") as plan_file:
        _enter(plan_file, output, _text_of(task), command)
        staging.require_room(folder, needed_bytes, staging.another_folder())
        with _alone(folder, share):
            record = _record(folder, task, share)
            if record is None:
                _record_path(folder, share).unlink(missing_ok=True)
            try:
                yield ShareFolder(folder, Logbook(_logbook_path(folder, share)), record)
            except BaseException as error:
                if staging.is_final(error):
                    _discard(folder, task, share)
                raise


def enter_record(folder: Path, record: ShareRecord) -> None:
    """Writes down that a share is whole and on disk."""
    content = json.dumps(record.as_document()).encode()
    local.write_file(_record_path(folder, record.share), content)


@contextmanager
def joining(output: Path, task: ShareTask) -> Iterator[tuple[Path, list[ShareRecord]]]:
    """The folder with all shares, and their records; it becomes ``output`` when the block
    ends without an error.

    ``CheckpointError`` names shares that are missing, or says that some are being written.
    """
    folder, count = staging.folder_for(output), task.divided.count
    require_shares(output)
    with open(folder / PLAN, "r+b") as plan_file:
        staging.lock(plan_file, output)
        if plan_file.read() != _text_of(task):
            raise CheckpointError(
                f"{folder} has shares of another plan: the checkpoint has changed since, or was "
                f"converted with other options; write all {count} shares again with {SHARE}",
                "output",
            )
        if not flock.OFFERED:
            plan_file.close()

        records = [_record(folder, task, share) for share in _shares(count)]
        missing = [number for number, record in enumerate(records, 1) if record is None]
        require_all(output, missing, count)
        try:
            yield folder, [record for record in records if record is not None]
            local.write_file(folder / JOINED, b"")
            finish(output)
        except BaseException as error:
            if staging.is_final(error):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def is_joined(output: Path) -> bool:
    """Whether shares were joined, and an interruption left nothing but to ``finish``."""
    return (staging.folder_for(output) / JOINED).exists() or (output / JOINED).exists()


def finish(output: Path) -> None:
    """Gives a folder of joined shares its name, without the records of these.

    At each moment the folder says that it is joined, so that this can be repeated.
    """
    folder = staging.folder_for(output)
    if folder.is_dir():
        paths = [*folder.glob("share-*-of-*.json"), *folder.glob("written-*-of-*.jsonl")]
        staging.commit(folder, output, [*(path.name for path in paths), COMMAND])
    (output / JOINED).unlink(missing_ok=True)
    LOCAL.sync(output)


def missing_shares(output: Path, task: ShareTask) -> list[int]:
    """The numbers of the shares that have no record yet."""
    folder = staging.folder_for(output)
    return [
        share.number
        for share in _shares(task.divided.count)
        if _record(folder, task, share) is None
    ]


def prepare(output: Path, task: ShareTask, command: SharedCommand | None) -> None:
    """Empties the folder of what is no share of these, before the first process writes.

    ``CheckpointError`` if it is in use. Only where processes begin together; others
    find out by the locks, which some filesystems do not have.
    """
    folder, text = staging.folder_for(output), _text_of(task)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / PLAN, "a+b") as plan_file:
        staging.lock(plan_file, output)
        plan_file.seek(0)
        if plan_file.read() != text or (folder / JOINED).exists():
            _begin(folder, plan_file, text, command)


def require_shares(output: Path) -> None:
    """``CheckpointError`` where no shares of an output lie."""
    folder = staging.folder_for(output)
    if not (folder / PLAN).is_file():
        hint = "it is there already" if output.is_dir() else f"write them with {SHARE('1/N')}"
        raise CheckpointError(f"{folder}: no shares of {output} are there; {hint}", "absent")


def place_of(output: Path) -> Path:
    """The folder that shares of an output are joined to: that of a single file is another."""
    file_folder = staging.folder_of_file(output)
    is_file = (staging.folder_for(file_folder) / PLAN).is_file()
    return file_folder if is_file else output


def count_of(place: Path) -> int:
    """How many shares make the output at ``place``."""
    require_shares(place)
    path = staging.folder_for(place) / PLAN
    words = path.read_text("utf-8").split()
    if len(words) != 4 or not words[2].isdecimal():
        raise CheckpointError(
            f"{path} is of a process that works alone, and of no shares; that command continues it",
            "output",
        )
    return int(words[2])


def command_of(place: Path) -> SharedCommand:
    """The command that the shares of an output were written with; ``CheckpointError`` if
    there are none."""
    require_shares(place)
    path = staging.folder_for(place) / COMMAND
    document = _document(path)
    try:
        arguments = [value(word, str, "a word") for word in entry(document, "arguments", list)]
        return SharedCommand(tuple(arguments), entry(document, "folder", str))
    except MalformedError as error:
        raise CheckpointError(
            f"{path} does not say how the shares of {place} were written; write them again with "
            f"{SHARE('1/N')}",
            "output",
        ) from error


def _document(path: Path) -> Any:
    """The JSON of a file; ``None`` where there is none, or one that a crash cut short."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def require_all(output: Path, missing: Sequence[int], count: int) -> None:
    """``CheckpointError`` where shares of ``count`` are missing."""
    if missing:
        names = some(f"{number}/{count}" for number in missing)
        raise CheckpointError(
            f"{output}: {counted(len(missing), 'share')} of {count} missing: {names}; "
            f"write them with {SHARE}, and join again",
            "output",
        )


def _enter(plan_file: IO[bytes], output: Path, text: bytes, command: SharedCommand | None) -> None:
    """Takes the shared lock of a folder that is one of these shares, emptied where it was
    not."""
    folder, deadline = staging.folder_for(output), time.monotonic() + PATIENCE
    while True:
        access = _take(plan_file, shared=False)
        plan_file.seek(0)
        present_text = plan_file.read()
        is_free = access is _Access.GRANTED or (
            access is _Access.WITHOUT_LOCKS and not present_text
        )
        is_other = present_text != text or (folder / JOINED).exists()
        if is_free and is_other:
            _begin(folder, plan_file, text, command)
        if _take(plan_file, shared=True) is not _Access.REFUSED:
            break
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder} is in use: another conversion writes {output}", "output"
            )
        time.sleep(0.05)

    plan_file.seek(0)
    if plan_file.read() != text:
        raise CheckpointError(
            f"{folder} is in use: processes write shares of another plan of {output}, of other "
            f"options or another number of shares; let them end, remove {folder} where none is at "
            "work, or choose another output",
            "output",
        )


def _begin(folder: Path, plan_file: IO[bytes], text: bytes, command: SharedCommand | None) -> None:
    """Empties a folder, and writes down what its shares are of; the plan last."""
    staging.clear(folder, set())
    if command is not None:
        document = {"arguments": list(command.arguments), "folder": command.folder}
        local.write_file(folder / COMMAND, bounded_json.dumps(document))
    staging.enter_plan(folder, plan_file, text)


class _Access(Enum):
    """What came of asking for a lock; some filesystems have none."""

    GRANTED = "granted"
    REFUSED = "refused"
    WITHOUT_LOCKS = "without locks"


def _take(plan_file: IO[bytes], *, shared: bool) -> _Access:
    """Asks for a lock, and does not wait for it."""
    try:
        flock.take(plan_file.fileno(), shared=shared)
    except BlockingIOError:
        return _Access.REFUSED
    except OSError:
        return _Access.WITHOUT_LOCKS
    return _Access.GRANTED


@contextmanager
def _alone(folder: Path, share: PlanShare) -> Iterator[None]:
    """Keeps a second process from the same share."""
    path = _logbook_path(folder, share)
    fd = opening.descriptor(path, os.O_RDWR | os.O_CREAT)
    try:
        flock.take(fd)
    except BlockingIOError as error:
        os.close(fd)
        raise CheckpointError(
            f"{path} is in use: another process writes {share.words}", "output"
        ) from error
    except OSError:
        pass  # a filesystem without locks
    try:
        yield
    finally:
        os.close(fd)


def _record(folder: Path, task: ShareTask, share: PlanShare) -> ShareRecord | None:
    """The record of a share whose files are there; ``None`` if there is none."""
    try:
        record = shares.record_of(_document(_record_path(folder, share)))
    except MalformedError:
        return None
    return record if record.share == share and shares.is_intact(task, record, folder) else None


def _discard(folder: Path, task: ShareTask, share: PlanShare) -> None:
    """Removes what a share wrote alone, after an error that makes it useless."""
    with suppress(OSError):
        for shard in task.divided.portions[share.number - 1].whole_shards:
            (folder / shard.filename).unlink(missing_ok=True)
        _logbook_path(folder, share).unlink(missing_ok=True)


def _text_of(task: ShareTask) -> bytes:
    """What plan.json says of a folder of shares: no plan of a process alone."""
    return f"{task.divided.plan.digest()} in {task.divided.count} shares".encode()


def _shares(count: int) -> list[PlanShare]:
    return [PlanShare(number, count) for number in range(1, count + 1)]


def _record_path(folder: Path, share: PlanShare) -> Path:
    return folder / f"share-{share.number}-of-{share.count}.json"


def _logbook_path(folder: Path, share: PlanShare) -> Path:
    return folder / f"written-{share.number}-of-{share.count}.jsonl"
