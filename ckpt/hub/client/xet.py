"""The one place that knows the Hub client's private parts: hf_xet's stream,
and what was sent.

huggingface_hub 2.4 takes no file object for Xet (``_commit_api._upload_files`` falls
back to LFS), and hashes every file object before it sends it. So a shard is written
into hf_xet's upload stream here, and the fields of its ``CommitOperationAdd`` are
filled as ``_upload_xet_files`` fills them. That is done with the versions in ``TESTED``
only; ``upload`` has ways that are public.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ckpt.hub.client import errors
from ckpt.hub.client.repository import RemoteFile
from ckpt.hub.content.items import Item
from converters.errors import CheckpointError
from converters.execute.virtual_file import ServedShard
from converters.execute.workers import Progress
from converters.plan import Shard
from converters.tensors import DType

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# huggingface_hub and hf_xet whose private parts are known
TESTED = (("2.4.0", "1.8.0"),)
STALLED = 20.0  # seconds without a byte after which a block is not waited for
_MOST_AT_ONCE = "client.ac_max_upload_concurrency"
_COMPRESSION = "xorb.compression_policy"
SAMPLE = 512  # bytes of a file that the Hub judges by (``lfs.UploadInfo``)


@dataclass(frozen=True, slots=True)
class UploadTarget:
    """Where a push goes.
    ``base`` is a branch that is there; names get ``place`` in front.

    ``blocks`` of Xet may be on their way at once, while another is made.
    """

    api: HfApi
    repo: str
    base: str
    create_pr: bool = False
    place: str = ""
    blocks: int = 1
    branch_files: Mapping[str, RemoteFile] = field(default_factory=dict)

    def branch_file(self, item: Item) -> RemoteFile | None:
        """The file that the branch has in the item's place."""
        return self.branch_files.get(self.place + item.name)


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file that the Hub has now.
    ``operation`` commits it; ``None`` where it was in the branch.

    ``blob`` is what git calls it, where it is in the commit itself: by that and
    ``sha256`` it is recognized after the commit, and nothing is read for it.
    ``moved`` is whether bytes were handed to the client.
    """

    path: str
    nbytes: int
    sha256: str
    blob: str | None
    operation: CommitOperationAdd | None
    moved: bool


def no_stream() -> str | None:
    """Why hf_xet's stream cannot be used; ``None`` if it can."""
    from huggingface_hub import constants

    hub_version = version("huggingface_hub")
    try:
        xet_version = version("hf_xet")
    except PackageNotFoundError:
        return "hf_xet is not installed"

    if constants.HF_HUB_DISABLE_XET:
        return "HF_HUB_DISABLE_XET is set"
    if (hub_version, xet_version) not in TESTED:
        tested_versions = " or ".join(
            f"{hub_tested} and {xet_version}" for hub_tested, xet_version in TESTED
        )
        return (
            f"huggingface_hub {hub_version} and hf_xet {xet_version} were not tested "
            f"with it ({tested_versions} were)"
        )

    return None


def require_wanted(target: UploadTarget, operations: Sequence[CommitOperationAdd]) -> None:
    """``CheckpointError`` for a file that the repository's .gitignore names.

    The client would leave it out of the commit without a word.
    """
    for operation in operations:
        if getattr(operation, "_should_ignore", False):
            raise CheckpointError(
                f"{target.repo}: its .gitignore keeps {operation.path_in_repo} out; "
                "change it there, and push again",
                "output",
            )


def _empty_operation(
    target: UploadTarget, item: Item, sample: bytes, sha256: str | None
) -> CommitOperationAdd:
    """An operation without its content, whose size, and perhaps digest, are known."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(target.place + item.name, b"")
    known_digest = bytes.fromhex(sha256) if sha256 else b""
    operation.upload_info = UploadInfo(
        size=item.nbytes,
        sample=sample,
        sha256=known_digest,
    )

    return operation


def _classify(target: UploadTarget, operation: CommitOperationAdd) -> str:
    """Asks the Hub how it wants the file: "lfs", or "regular" with the commit."""
    from huggingface_hub._commit_api import _fetch_upload_modes

    _fetch_upload_modes(
        additions=[operation],
        repo_type="model",
        repo_id=target.repo,
        headers=_headers(target.api),
        revision=quote(target.base, safe=""),
        endpoint=target.api.endpoint,
        create_pr=target.create_pr,
    )
    require_wanted(target, [operation])

    return str(operation._upload_mode)


def _headers(api: HfApi) -> dict[str, str]:
    return dict(api._build_hf_headers())


def known_there(target: UploadTarget, item: Item, sha256: str) -> UploadedFile | None:
    """A shard that an earlier push sent,
    if the Hub says that it has it (git LFS batch API)."""
    if version("huggingface_hub") not in [hub_version for hub_version, _ in TESTED]:
        return None

    from huggingface_hub.lfs import post_lfs_batch_info

    assert isinstance(item.source, Shard)
    header = next((literal for offset, literal in item.source.literals if offset == 0), b"")
    operation = _empty_operation(target, item, header[:SAMPLE], sha256)
    if _classify(target, operation) != "lfs":
        return None

    batch_answers, _, _ = post_lfs_batch_info(
        upload_infos=[operation.upload_info],
        token=None,
        repo_type="model",
        repo_id=target.repo,
        revision=None if target.create_pr else quote(target.base, safe=""),
        endpoint=target.api.endpoint,
        headers=_headers(target.api),
    )
    if len(batch_answers) != 1 or batch_answers[0].get("actions") is not None:
        return None

    operation._is_uploaded = True

    return UploadedFile(operation.path_in_repo, item.nbytes, sha256, None, operation, False)


def stream(
    target: UploadTarget,
    item: Item,
    served: ServedShard,
    progress: Progress,
) -> UploadedFile | None:
    """Sends a shard by hf_xet,
    in one pass; ``None`` if the Hub wants it in the commit itself."""
    assert isinstance(item.source, Shard)
    operation = _empty_operation(target, item, served.read(SAMPLE), None)
    served.seek(0)
    if _classify(target, operation) != "lfs":
        return None

    served.progress = progress
    session = _session(target.blocks, _compression(item.source))
    try:
        digest = _streamed(session, target, item.name, served)
    except KeyboardInterrupt:
        session.sigint_abort()
        _session.cache_clear()
        raise
    except CheckpointError:
        raise
    except Exception as error:  # hf_xet has no class of its own for most of them
        raise errors.xet_failed(target.repo, error) from error

    operation.upload_info.sha256 = bytes.fromhex(digest)
    operation._is_uploaded = True

    return UploadedFile(operation.path_in_repo, item.nbytes, digest, None, operation, True)


def _streamed(session: Any, target: UploadTarget, name: str, served: ServedShard) -> str:
    """The SHA-256 of a shard, once the Hub's store has all its bytes."""
    import hf_xet
    from huggingface_hub.utils import _xet

    token_url = _xet.xet_connection_info_refresh_url(
        token_type=_xet.XetTokenType.WRITE,
        repo_id=target.repo,
        repo_type="model",
        revision=quote(target.base, safe="") if not target.create_pr else None,
        endpoint=target.api.endpoint,
    )
    headers = _headers(target.api)
    with session.new_upload_commit(
        token_refresh_url=token_url + ("?create_pr=1" if target.create_pr else ""),
        token_refresh_headers=headers,
        custom_headers=_xet.xet_headers_without_auth(headers),
    ) as commit:
        upload = commit.start_upload_stream(name, sha256=hf_xet.COMPUTE_SHA256)
        try:
            while block := served.read1():
                upload.write(block)
            served.check()
            _wait_for_store(commit)
        except BaseException:
            upload.abort()
            raise

        return str(upload.finish().xet_info.sha256)


@cache
def _session(blocks: int, compression: str) -> Any:
    """hf_xet's own,
    but for what it holds of the blocks of 64 MB that it packs and sends.

    One that is packed waits until fewer than ``blocks`` are on their way, and nothing
    is taken in meanwhile. What was packed is given back piece by piece where the
    compression is named; with "auto" the block is held until all of it is packed
    (xet-core, xorb_object_format.rs).
    """
    import hf_xet

    config = hf_xet.XetConfig()
    settings = {"client.ac_initial_upload_concurrency": blocks, _MOST_AT_ONCE: blocks}
    compression_setting = (
        {_COMPRESSION: compression} if config.get(_COMPRESSION) in ("", "auto") else {}
    )

    return hf_xet.XetSession(config.with_config(settings | compression_setting))


def _compression(shard: Shard) -> str:
    """Of random weights "auto" makes 86 % in bf16, 95 % in fp32 and 100 % in fp16.

    For the latter that is a third of the time that the processor spends on a push.
    """
    is_bf16 = any(placement.dtype is DType.BF16 for placement in shard.placements)
    return "bg4-lz4" if is_bf16 else "none"


def _wait_for_store(commit: Any) -> None:
    """Waits for the blocks on their way,
    since the end of a file makes one that nothing holds back.

    A store that does not move is left to its own errors.
    """
    deadline, last_arrived = time.monotonic() + STALLED, -1
    while time.monotonic() < deadline:
        upload_progress = commit.progress()
        arrived_bytes = upload_progress.total_transfer_bytes_completed
        if arrived_bytes == upload_progress.total_transfer_bytes:
            return
        if arrived_bytes != last_arrived:
            deadline, last_arrived = time.monotonic() + STALLED, arrived_bytes
        time.sleep(0.005)
