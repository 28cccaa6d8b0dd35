"""The bytes of a push on their way, each file by the way that suits it; nothing is committed here.

    xet      a shard goes into hf_xet's upload stream while it is made; nothing is on disk
    lfs      a shard is read twice through the client's public API: for its SHA-256, and to be sent
    stage    one shard at a time is written to a folder, sent through the public API, and removed

Files and bytes that need no conversion go through ``HfApi.preupload_lfs_files`` in every case.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from ckpt.hub import refusals, remote, transport
from ckpt.hub.items import Item
from ckpt.hub.journal import Journal
from ckpt.hub.transport import Sent, Target
from ckpt.runs import locks
from converters import files
from converters.errors import CheckpointError
from converters.mover import Progress
from converters.plan import Shard
from converters.served import ServedShard, Serving

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Way = Literal["xet", "lfs", "stage"]
STAGED = ".ckpt-push-"  # and what mkdtemp adds, and .partial
WAYS = ("auto", "xet", "lfs", "stage")


def choose(asked: str, stage: Path | None) -> tuple[Way, str | None]:
    """The way to send shards, and a line on why it is not the best, if it is not.

    ``CheckpointError`` for a way that is asked for and not there.
    """
    if asked == "stage" or (asked == "auto" and stage is not None):
        if stage is None:
            raise CheckpointError("the transport stage needs a folder; add --stage-dir", "output")
        return "stage", None
    why = transport.no_stream()
    if asked == "xet" and why:
        raise CheckpointError(f"the transport xet is not possible: {why}", "unsupported")
    if asked == "lfs" or why:
        note = f"{why}; shards go by LFS, which reads them twice; --stage-dir is the other way"
        return "lfs", note if asked == "auto" else None
    return "xet", None


def send(
    target: Target,
    items: Sequence[Item],
    shards: tuple[Serving, Journal] | None,
    way: Way,
    stage: Path | None = None,
    progress: Progress = lambda _: None,
) -> list[Sent]:
    """Gives the Hub the content of every item; commits nothing.

    What the branch has already is left out. ``shards`` is what serves those among the items, and
    their journal. ``progress`` gets bytes, about ``nbytes`` of each item. ``CheckpointError`` if a
    byte is not what it should be; the client's errors come as they are.
    """
    sent = _send_files(target, [i for i in items if not isinstance(i.source, Shard)], progress)
    if shards is None:
        return sent
    serving, journal = shards
    with _staging(stage if way == "stage" else None) as folder:
        for item in items:
            if not isinstance(item.source, Shard):
                continue
            known = journal.sha256.get(item.name)
            one = _known(target, item, known) if known else None
            if one is None:
                with contextlib.closing(serving.open(item.source)) as served:
                    one = _send_shard(target, item, served, way, folder, progress)
                if known is not None and known != one.sha256:
                    journal.forget()
                    raise CheckpointError(
                        f"{item.name} has other bytes than when an earlier push read it; push again"
                    )
                journal.note(item.name, one.sha256, serving)
            else:
                progress(item.nbytes)
            there = target.there(item)
            if there and there.is_known(one.nbytes, one.sha256, one.blob):
                one = replace(one, operation=None)
            sent.append(one)
    return sent


def _known(target: Target, item: Item, sha256: str) -> Sent | None:
    """A shard that an earlier push read, if the branch has it, or the Hub by its own word."""
    there = target.there(item)
    if there and there.is_content(item.nbytes, sha256, None):
        return Sent(target.place + item.name, item.nbytes, sha256, None, None, False)
    return transport.known_there(target, item, sha256)


def _send_files(target: Target, items: Sequence[Item], progress: Progress) -> list[Sent]:
    """Files as they are, and bytes, by the client's own means."""
    from huggingface_hub import CommitOperationAdd

    sent, operations = [], []
    for item in items:
        assert not isinstance(item.source, Shard)
        path, there = target.place + item.name, target.there(item)
        known = remote.sha256(item.source) if there and there.size == item.nbytes else ""
        if there and there.is_content(item.nbytes, known, item.source):
            blob = None if there.sha256 else there.blob
            sent.append(Sent(path, item.nbytes, known, blob, None, False))
            progress(item.nbytes)
        else:
            given = item.source if isinstance(item.source, bytes) else item.source.absolute()
            with refusals.at(item.source):
                operations.append((item, CommitOperationAdd(path, given)))
    _preupload(target, [operation for _, operation in operations])
    for item, operation in operations:
        with refusals.at(item.source):
            sent.append(_taken(item, operation))
        progress(item.nbytes)
    return sent


def _preupload(target: Target, operations: list[CommitOperationAdd]) -> None:
    """Sends what goes by LFS or Xet; what is not emptied by that goes with the commit."""
    if operations:
        send = partial(
            target.api.preupload_lfs_files,
            target.repo,
            operations,
            revision=target.base,
            create_pr=target.create_pr,
            free_memory=True,
        )
        with refusals.at(*(operation.path_or_fileobj for operation in operations)):
            for left in (2, 1, 0):
                try:
                    send()
                    break
                except Exception as error:
                    if not (left and refusals.interrupted(error)):
                        raise
        transport.require_wanted(target, operations)


def _taken(item: Item, operation: CommitOperationAdd) -> Sent:
    """A file whose bytes the client has taken, or holds here for the commit: then they are few.

    So nothing is read when the commit is made, nor behind it, where an error would come too late.
    """
    blob = None
    if operation.path_or_fileobj != b"" or not item.nbytes:
        with operation.as_file() as file:
            operation.path_or_fileobj = held = file.read()
        operation.upload_info.sha256 = hashlib.sha256(held).digest()
        blob = remote.git_blob(held)
        if len(held) != item.nbytes:
            raise CheckpointError(f"{item.name} changed while it was read; push again")
    found = operation.upload_info.sha256.hex()
    return Sent(operation.path_in_repo, item.nbytes, found, blob, operation, True)


def _send_shard(
    target: Target, item: Item, served: ServedShard, way: Way, folder: Path, progress: Progress
) -> Sent:
    """A shard that must be read. ``check`` comes before the Hub has all of it, whatever the way."""
    from huggingface_hub import CommitOperationAdd

    path = target.place + item.name
    if way == "stage":
        file = folder / Path(item.name).name
        served.progress = progress
        try:
            _write(served, file)
            with refusals.at(file):
                return _upload(target, item, CommitOperationAdd(path, file))
        finally:
            file.unlink(missing_ok=True)
    if way == "xet" and (one := transport.stream(target, item, served, progress)) is not None:
        return one
    served.seek(0)
    operation = CommitOperationAdd(path, cast(BinaryIO, served))
    served.check()
    served.progress = progress
    return _upload(target, item, operation)


def _write(served: ServedShard, path: Path) -> None:
    with files.replacing(path) as fd:
        writer, at = files.Writer(fd), 0
        while data := served.read1():
            writer.write(data, at)
            at += len(data)
        served.check()


def _upload(target: Target, item: Item, operation: CommitOperationAdd) -> Sent:
    """A shard by the public API; one that the Hub wants in the commit itself is small, and kept."""
    _preupload(target, [operation])
    return _taken(item, operation)


@contextlib.contextmanager
def _staging(stage: Path | None) -> Iterator[Path]:
    """A folder of this push's own, locked, gone when it ends; those of killed pushes go first."""
    if stage is None:
        yield Path()
        return
    stage.mkdir(parents=True, exist_ok=True)
    for left in stage.glob(f"{STAGED}*.partial"):
        if (dead := locks.exclusive(left)) is not None:
            with dead:
                if dead.fd is not None:  # where there are no locks, nobody can tell
                    shutil.rmtree(left, ignore_errors=True)
    folder, lock = _own(stage)
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own(stage: Path) -> tuple[Path, locks.Lock]:
    """A new folder and its lock; one that another push took for a dead one's is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=STAGED, suffix=".partial", dir=stage))
        lock = locks.exclusive(folder)
        if lock is not None and folder.is_dir():
            return folder, lock
