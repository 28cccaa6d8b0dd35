"""The bytes of a push on their way,
each file by the way that suits it; nothing is committed here.

    xet      a shard goes into hf_xet's upload stream while it is made; nothing is on disk
    lfs      a shard is read twice through the client's public API: for its SHA-256, and to be sent
    stage    one shard at a time is written to a folder, sent through the public API, and removed

Files and bytes that need no conversion go through ``HfApi.preupload_lfs_files`` in
every case.
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

from ckpt.folders import locks
from ckpt.hub.client import errors, repository, xet
from ckpt.hub.client.xet import UploadedFile, UploadTarget
from ckpt.hub.content.items import Item
from ckpt.hub.journal import Journal
from converters.errors import CheckpointError
from converters.execute.virtual_file import ServedShard, Serving
from converters.execute.workers import Progress
from converters.options import STAGE_DIR
from converters.plan import Shard
from converters.storage import local

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Transport = Literal["xet", "lfs", "stage"]
STAGED = ".ckpt-push-"  # and what mkdtemp adds, and .partial
TRANSPORTS = ("auto", "xet", "lfs", "stage")


def choose(requested_way: str, stage_folder: Path | None) -> tuple[Transport, str | None]:
    """The way to send shards, and a line on why it is not the best, if it is not.

    ``CheckpointError`` for a way that is asked for and not there.
    """
    if requested_way == "stage" or (requested_way == "auto" and stage_folder is not None):
        if stage_folder is None:
            raise CheckpointError(
                f"the transport stage needs a folder; add {STAGE_DIR}",
                "output",
            )
        return "stage", None

    obstacle = xet.no_stream()
    if requested_way == "xet" and obstacle:
        raise CheckpointError(
            f"the transport xet is not possible: {obstacle}",
            "unsupported",
        )
    if requested_way == "lfs" or obstacle:
        note = f"{obstacle}; shards go by LFS, which reads them twice; {STAGE_DIR} is the other way"
        return "lfs", note if requested_way == "auto" else None

    return "xet", None


def send(
    target: UploadTarget,
    items: Sequence[Item],
    shards: tuple[Serving, Journal] | None,
    way: Transport,
    stage_folder: Path | None = None,
    progress: Progress = lambda _: None,
) -> list[UploadedFile]:
    """Gives the Hub the content of every item; commits nothing.

    What the branch has already is left out. ``shards`` is what serves those among the
    items, and their journal. ``progress`` gets bytes, about ``nbytes`` of each item.
    ``CheckpointError`` if a byte is not what it should be; the client's errors come as
    they are.
    """
    sent_files = _send_files(
        target, [item for item in items if not isinstance(item.source, Shard)], progress
    )
    if shards is None:
        return sent_files

    serving, journal = shards
    with _staging(stage_folder if way == "stage" else None) as folder:
        for item in items:
            if not isinstance(item.source, Shard):
                continue

            known_digest = journal.sha256.get(item.name)
            sent_file = _find_known(target, item, known_digest) if known_digest else None
            if sent_file is None:
                with contextlib.closing(serving.open(item.source)) as served:
                    sent_file = _send_shard(target, item, served, way, folder, progress)
                if known_digest is not None and known_digest != sent_file.sha256:
                    journal.forget()
                    raise CheckpointError(
                        f"{item.name} has other bytes than when an earlier push "
                        "read it; push again",
                        "output",
                    )

                journal.note(item.name, sent_file.sha256, serving)
            else:
                progress(item.nbytes)

            branch_file = target.branch_file(item)
            if branch_file and branch_file.is_known(
                sent_file.nbytes, sent_file.sha256, sent_file.blob
            ):
                sent_file = replace(sent_file, operation=None)

            sent_files.append(sent_file)

    return sent_files


def _find_known(target: UploadTarget, item: Item, sha256: str) -> UploadedFile | None:
    """A shard that an earlier push read,
    if the branch has it, or the Hub by its own word."""
    branch_file = target.branch_file(item)
    if branch_file and branch_file.is_content(item.nbytes, sha256, None):
        return UploadedFile(target.place + item.name, item.nbytes, sha256, None, None, False)
    return xet.known_there(target, item, sha256)


def _send_files(
    target: UploadTarget, items: Sequence[Item], progress: Progress
) -> list[UploadedFile]:
    """Files as they are, and bytes, by the client's own means."""
    from huggingface_hub import CommitOperationAdd

    sent_files, operations = [], []
    for item in items:
        assert not isinstance(item.source, Shard)
        repo_path, branch_file = target.place + item.name, target.branch_file(item)
        content_digest = (
            repository.sha256(item.source)
            if branch_file and branch_file.size == item.nbytes
            else ""
        )
        if branch_file and branch_file.is_content(item.nbytes, content_digest, item.source):
            blob = None if branch_file.sha256 else branch_file.blob
            sent_files.append(
                UploadedFile(repo_path, item.nbytes, content_digest, blob, None, False)
            )
            progress(item.nbytes)
        else:
            source = item.source
            content = source if isinstance(source, bytes) else source.absolute()
            with errors.naming_file(item.source):
                operations.append((item, CommitOperationAdd(repo_path, content)))

    _preupload(target, [operation for _, operation in operations])
    for item, operation in operations:
        with errors.naming_file(item.source):
            sent_files.append(_sent_file(item, operation))
        progress(item.nbytes)

    return sent_files


def _preupload(target: UploadTarget, operations: list[CommitOperationAdd]) -> None:
    """Sends what goes by LFS or Xet; what is not emptied by that goes with the commit."""
    if operations:
        preupload = partial(
            target.api.preupload_lfs_files,
            target.repo,
            operations,
            revision=target.base,
            create_pr=target.create_pr,
            free_memory=True,
        )
        with errors.naming_file(*(operation.path_or_fileobj for operation in operations)):
            for remaining_tries in (2, 1, 0):
                try:
                    preupload()
                    break
                except Exception as error:
                    if not (remaining_tries and errors.interrupted(error)):
                        raise

        xet.require_wanted(target, operations)


def _sent_file(item: Item, operation: CommitOperationAdd) -> UploadedFile:
    """A file whose bytes the client has taken,
    or holds here for the commit: then they are few.

    So nothing is read when the commit is made, nor after it, where an error would come
    too late.
    """
    git_blob = None
    if operation.path_or_fileobj != b"" or not item.nbytes:
        with operation.as_file() as stream:
            operation.path_or_fileobj = content = stream.read()
        operation.upload_info.sha256 = hashlib.sha256(content).digest()
        git_blob = repository.git_blob(content)
        if len(content) != item.nbytes:
            raise CheckpointError(f"{item.name} changed while it was read; push again", "output")

    content_sha256 = operation.upload_info.sha256.hex()

    return UploadedFile(
        operation.path_in_repo,
        item.nbytes,
        content_sha256,
        git_blob,
        operation,
        True,
    )


def _send_shard(
    target: UploadTarget,
    item: Item,
    served: ServedShard,
    way: Transport,
    folder: Path,
    progress: Progress,
) -> UploadedFile:
    """A shard that must be read.
    ``check`` comes before the Hub has all of it, whatever the way."""
    from huggingface_hub import CommitOperationAdd

    repo_path = target.place + item.name
    if way == "stage":
        staged_file = folder / Path(item.name).name
        served.progress = progress
        try:
            _write(served, staged_file)
            with errors.naming_file(staged_file):
                return _upload(target, item, CommitOperationAdd(repo_path, staged_file))
        finally:
            staged_file.unlink(missing_ok=True)

    if way == "xet":
        sent_file = xet.stream(target, item, served, progress)
        if sent_file is not None:
            return sent_file

    served.seek(0)
    operation = CommitOperationAdd(repo_path, cast(BinaryIO, served))
    served.check()
    served.progress = progress

    return _upload(target, item, operation)


def _write(served: ServedShard, staged_file: Path) -> None:
    with local.replacing(staged_file) as fd:
        writer, offset = local.LocalWriter(fd), 0
        while block := served.read1():
            writer.write(block, offset)
            offset += len(block)
        served.check()


def _upload(target: UploadTarget, item: Item, operation: CommitOperationAdd) -> UploadedFile:
    """A shard by the public API;
    one that the Hub wants in the commit itself is small, and kept."""
    _preupload(target, [operation])
    return _sent_file(item, operation)


@contextlib.contextmanager
def _staging(stage_folder: Path | None) -> Iterator[Path]:
    """A folder of this push's own, locked,
    gone when it ends; those of killed pushes go first."""
    if stage_folder is None:
        yield Path()
        return

    stage_folder.mkdir(parents=True, exist_ok=True)
    for leftover in stage_folder.glob(f"{STAGED}*.partial"):
        if (leftover_lock := locks.exclusive(leftover)) is not None:
            with leftover_lock:
                # where there are no locks, nobody can tell
                if leftover_lock.fd is not None:
                    shutil.rmtree(leftover, ignore_errors=True)

    folder, lock = _new_folder(stage_folder)
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(stage_folder: Path) -> tuple[Path, locks.Lock]:
    """A new folder and its lock;
    one that another push took for a dead one's is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=STAGED, suffix=".partial", dir=stage_folder))
        lock = locks.exclusive(folder)
        if lock is not None and folder.is_dir():
            return folder, lock
