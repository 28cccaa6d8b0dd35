"""The commit of a push: one, on the branch as it was seen, or none.

    branch is there      create_commit with the head that was seen; another head: nothing happens
    branch is new        commit on BRANCH.ckpt-partial, made from that head -> verified -> BRANCH at
                         that commit -> the other deleted; so BRANCH never shows anything else
    pull request         from the head that was seen

The client sends files again by itself, but not a commit, since an answer that is lost says nothing.
Here the branch is looked at before it is tried again.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt.hub import remote
from ckpt.hub.patience import WAITS, asked, passing, patient, status
from ckpt.hub.remote import Held, Remote
from ckpt.hub.transport import Sent
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PARTIAL = ".ckpt-partial"  # no user calls a branch so


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit does: files that come or change, names that go (a folder's ends in "/")."""

    sent: tuple[Sent, ...]
    deleted: tuple[str, ...]
    message: str
    create_pr: bool = False

    @property
    def empty(self) -> bool:
        """Whether the branch holds all of it already."""
        return not self.deleted and all(one.operation is None for one in self.sent)


@dataclass(frozen=True, slots=True)
class Landed:
    """A commit that is there, and was verified. ``made`` is whether it is a new one."""

    url: str
    oid: str
    made: bool
    pull_request: str | None = None


def land(api: HfApi, seen: Remote, change: Change) -> Landed:
    """Commits, verifies, and only then shows a new branch.

    ``CheckpointError`` if somebody else changed the branch, or the Hub does not hold what was sent.
    """
    assert seen.head is not None
    aside = seen.branch + PARTIAL
    if not (seen.branch == remote.MAIN or seen.branch.startswith("refs/") or change.create_pr):
        _delete(api, seen.repo, aside)  # what a killed push left
    if not seen.new:
        if change.empty:
            return Landed(_url(api, seen.repo, seen.head), seen.head, False)
        return _commit(api, seen, seen.branch, change)
    if change.empty:
        _show(api, seen, seen.head)
        return Landed(_url(api, seen.repo, seen.head), seen.head, False)
    try:
        patient(
            lambda: api.create_branch(seen.repo, branch=aside, revision=seen.head, exist_ok=True)
        )
        landed = _commit(api, seen, aside, change)
        _show(api, seen, landed.oid)
    finally:
        _delete(api, seen.repo, aside)
    return landed


def _show(api: HfApi, seen: Remote, oid: str) -> None:
    """Makes the branch at the commit; somebody else's, made meanwhile, is left alone."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patient(lambda: api.create_branch(seen.repo, branch=seen.branch, revision=oid))
    except HfHubHTTPError as error:
        if status(error) != 409:
            raise
        if patient(lambda: api.repo_info(seen.repo, revision=seen.branch)).sha != oid:
            raise _moved(seen) from error


def _delete(api: HfApi, repo: str, branch: str) -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError, httpx2.TransportError):
        patient(lambda: api.delete_branch(repo, branch=branch), remote.SOON)


def _url(api: HfApi, repo: str, oid: str) -> str:
    return f"{api.endpoint}/{repo}/commit/{oid}"


def _moved(seen: Remote) -> CheckpointError:
    return CheckpointError(
        f"{seen.repo}: somebody else changed {seen.branch} while this push ran; it is as they left "
        "it, push again",
        "output",
    )


def _commit(api: HfApi, seen: Remote, branch: str, change: Change) -> Landed:
    """The commit, tried again where it is known not to have happened."""
    for wait in (*WAITS, None):
        try:
            return _once(api, seen, branch, change)
        except CheckpointError:
            raise
        except Exception as error:
            number = status(error)
            if number != 412 and not passing(error):
                raise
            if change.create_pr and number not in (429, 503):
                raise CheckpointError(
                    f"{seen.repo}: no answer came to the request for a pull request; look there "
                    "whether it was opened before you push again",
                    "output",
                ) from error
            if not change.create_pr and (found := _own(api, seen, branch, change)) is not None:
                return found
            if number == 412:
                raise _moved(seen) from error
            if wait is None:
                raise
            time.sleep(asked(error) or wait)
    raise AssertionError("unreachable")


def _once(api: HfApi, seen: Remote, branch: str, change: Change) -> Landed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) for name in change.deleted
    ]
    operations += [one.operation for one in change.sent if one.operation is not None]
    made = api.create_commit(
        seen.repo,
        operations,
        commit_message=change.message,
        revision=branch,
        parent_commit=seen.head,
        create_pr=change.create_pr,
    )
    require(seen, remote.tree(api, seen.repo, made.pr_revision or made.oid), change)
    return Landed(str(made.commit_url), made.oid, True, made.pr_url)


def _own(api: HfApi, seen: Remote, branch: str, change: Change) -> Landed | None:
    """The commit, if it happened though no answer said so; ``None`` if the head is still there.

    ``CheckpointError`` if another one is there.
    """
    head = str(patient(lambda: api.repo_info(seen.repo, revision=branch)).sha)
    if head == seen.head:
        return None
    try:
        require(seen, remote.tree(api, seen.repo, head), change)
    except CheckpointError as error:
        raise _moved(seen) from error
    return Landed(_url(api, seen.repo, head), head, True)


def require(seen: Remote, found: dict[str, Held], change: Change) -> None:
    """``CheckpointError`` unless a tree holds all that was sent and nothing that was deleted."""
    for one in change.sent:
        held = found.get(one.path)
        if held is None or not held.is_known(one.nbytes, one.sha256, one.blob):
            what = "is not there" if held is None else f"has {held.size:,} bytes of other content"
            raise CheckpointError(
                f"{seen.repo}: {one.path} {what} after the commit, expected {one.nbytes:,} bytes "
                f"with SHA-256 {one.sha256}; push again",
                "output",
            )
    for name in change.deleted:
        if any(path == name or (name[-1] == "/" and path.startswith(name)) for path in found):
            raise CheckpointError(
                f"{seen.repo}: {name} is still there after the commit; push again", "output"
            )
