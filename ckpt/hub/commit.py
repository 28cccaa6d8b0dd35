"""The commit of a push: one, on the branch as it was seen, or none.

    branch is there      create_commit with the head that was seen; another head: nothing happens
    branch is new        commit on BRANCH.ckpt-partial, made from that head -> verified -> BRANCH at
                         that commit -> the other deleted; so BRANCH never shows anything else
    pull request         from the head that was seen

The client sends files again by itself, but not a commit, since an answer that is lost
says nothing. Here the branch is looked at before it is tried again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt.hub.client import repository
from ckpt.hub.client.repository import Remote, RemoteFile
from ckpt.hub.client.retry import (
    WAITS,
    connection_errors,
    is_transient,
    retry,
    retry_after,
    status,
)
from ckpt.hub.client.xet import UploadedFile
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PARTIAL = ".ckpt-partial"  # no user calls a branch so


@dataclass(frozen=True, slots=True)
class CommitChange:
    """The changes of a commit: files that come or change, names that go (a folder's
    ends in "/")."""

    sent_files: tuple[UploadedFile, ...]
    deleted: tuple[str, ...]
    message: str
    create_pr: bool = False

    @property
    def empty(self) -> bool:
        """Whether the branch holds all of it already."""
        return not self.deleted and all(file.operation is None for file in self.sent_files)


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that is there, and was verified. ``is_new`` is whether this push made it."""

    url: str
    oid: str
    is_new: bool
    pull_request: str | None = None


def commit(api: HfApi, remote: Remote, change: CommitChange) -> Committed:
    """Commits, verifies, and only then shows a new branch.

    ``CheckpointError`` if somebody else changed the branch, or the Hub does not hold
    what was sent.
    """
    assert remote.head is not None
    partial_branch = remote.branch + PARTIAL
    is_lasting = remote.branch == repository.MAIN or remote.branch.startswith("refs/")
    if not (is_lasting or change.create_pr):
        _delete(api, remote.repo, partial_branch)  # what a killed push left

    if not remote.new:
        if change.empty:
            return Committed(_url(api, remote.repo, remote.head), remote.head, False)
        return _commit(api, remote, remote.branch, change)

    if change.empty:
        _show(api, remote, remote.head)
        return Committed(_url(api, remote.repo, remote.head), remote.head, False)

    try:
        retry(
            lambda: api.create_branch(
                remote.repo, branch=partial_branch, revision=remote.head, exist_ok=True
            )
        )
        landed_commit = _commit(api, remote, partial_branch, change)
        _show(api, remote, landed_commit.oid)
    finally:
        _delete(api, remote.repo, partial_branch)

    return landed_commit


def _show(api: HfApi, remote: Remote, commit_id: str) -> None:
    """Makes the branch at the commit; somebody else's, made meanwhile, is left alone."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        retry(lambda: api.create_branch(remote.repo, branch=remote.branch, revision=commit_id))
    except HfHubHTTPError as error:
        if status(error) != 409:
            raise
        if retry(lambda: api.repo_info(remote.repo, revision=remote.branch)).sha != commit_id:
            raise _moved_error(remote) from error


def _delete(api: HfApi, repo: str, branch: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        retry(lambda: api.delete_branch(repo, branch=branch), repository.SOON)
    except Exception as error:
        if isinstance(error, (HfHubHTTPError, *connection_errors())):
            return
        raise


def _url(api: HfApi, repo: str, commit_id: str) -> str:
    return f"{api.endpoint}/{repo}/commit/{commit_id}"


def _moved_error(remote: Remote) -> CheckpointError:
    return CheckpointError(
        f"{remote.repo}: somebody else changed {remote.branch} while this push ran; "
        "the branch is as they left it, push again",
        "output",
    )


def _commit(api: HfApi, remote: Remote, branch: str, change: CommitChange) -> Committed:
    """The commit, tried again where it is known not to have happened."""
    for pause in (*WAITS, None):
        try:
            return _commit_once(api, remote, branch, change)
        except CheckpointError:
            raise
        except Exception as error:
            http_status = status(error)
            if http_status != 412 and not is_transient(error):
                raise
            if change.create_pr and http_status not in (429, 503):
                raise CheckpointError(
                    f"{remote.repo}: no answer came to the request for a pull request; "
                    "look there whether it was opened before you push again",
                    "output",
                ) from error

            if (
                not change.create_pr
                and (own_commit := _find_own_commit(api, remote, branch, change)) is not None
            ):
                return own_commit

            if http_status == 412:
                raise _moved_error(remote) from error
            if pause is None:
                raise

            time.sleep(retry_after(error) or pause)

    raise AssertionError("unreachable")


def _commit_once(api: HfApi, remote: Remote, branch: str, change: CommitChange) -> Committed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(deleted_name) for deleted_name in change.deleted
    ]
    operations += [file.operation for file in change.sent_files if file.operation is not None]
    commit_info = api.create_commit(
        remote.repo,
        operations,
        commit_message=change.message,
        revision=branch,
        parent_commit=remote.head,
        create_pr=change.create_pr,
    )
    require(
        remote,
        repository.files(api, remote.repo, commit_info.pr_revision or commit_info.oid),
        change,
    )

    return Committed(str(commit_info.commit_url), commit_info.oid, True, commit_info.pr_url)


def _find_own_commit(
    api: HfApi,
    remote: Remote,
    branch: str,
    change: CommitChange,
) -> Committed | None:
    """The commit,
    if it happened though no answer said so; ``None`` if the head is still there.

    ``CheckpointError`` if another one is there.
    """
    branch_head = str(retry(lambda: api.repo_info(remote.repo, revision=branch)).sha)
    if branch_head == remote.head:
        return None

    try:
        require(remote, repository.files(api, remote.repo, branch_head), change)
    except CheckpointError as error:
        raise _moved_error(remote) from error

    return Committed(_url(api, remote.repo, branch_head), branch_head, True)


def require(remote: Remote, branch_files: dict[str, RemoteFile], change: CommitChange) -> None:
    """``CheckpointError`` unless a tree holds all
    that was sent and nothing that was deleted."""
    for sent_file in change.sent_files:
        branch_file = branch_files.get(sent_file.path)
        if branch_file is None or not branch_file.is_known(
            sent_file.nbytes, sent_file.sha256, sent_file.blob
        ):
            difference = (
                "is not there"
                if branch_file is None
                else f"has {branch_file.size:,} bytes of other content"
            )
            raise CheckpointError(
                f"{remote.repo}: {sent_file.path} {difference} after the commit, "
                f"expected {sent_file.nbytes:,} bytes with SHA-256 {sent_file.sha256}; "
                "push again",
                "output",
            )

    for deleted in change.deleted:
        if any(
            path == deleted or (deleted[-1] == "/" and path.startswith(deleted))
            for path in branch_files
        ):
            raise CheckpointError(
                f"{remote.repo}: {deleted} is still there after the commit; push again",
                "output",
            )
