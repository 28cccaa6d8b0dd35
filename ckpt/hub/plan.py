"""A push decided on: what is in the repository, what comes, and what goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.folders.filenames import MANIFEST
from ckpt.hub import upload, wholeness
from ckpt.hub.client import errors, repository
from ckpt.hub.client.repository import Remote
from ckpt.hub.content.allow_list import CARD
from ckpt.hub.content.contents import contents
from ckpt.hub.content.items import Contents, Item, unfit
from ckpt.hub.upload import Transport
from ckpt.runs import manifest
from ckpt.runs.run import RunCheckpoint
from ckpt.version import __version__
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import (
    INCLUDE_TRAINING_STATE,
    KEEP_LAST,
    PATH_IN_REPO,
    REVISION,
)
from converters.storage import open_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_UNFIT_BRANCH = LazyPattern(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|^[-/]|[/.]$|\.lock$")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """The options of a push: what is published of a checkpoint, where, and how.

    ``dtype`` is a key of ``request.DTYPES``; by default fp32 of states, and weights
    alone as they are stored. ``max_shard_size`` is in bytes. ``uncommitted`` publishes
    what is neither committed nor complete, as far as its weights can be read.
    ``revision`` is a branch (main), made by the push where there is none; ``private``
    counts only where the repository is made. ``keep_last`` deletes older steps, after
    the commit where they are branches. ``blocks`` of 64 MB may be on their way by Xet at
    once, each of which takes that much memory. ``verify_download`` reads headers back.
    """

    dtype: str | None = None
    max_shard_size: int = 5_000_000_000
    request: Request | None = None
    training_state: bool = False
    uncommitted: bool = False
    revision: str | None = None
    path_in_repo: str | None = None
    create_pr: bool = False
    message: str | None = None
    private: bool = True
    keep_last: int | None = None
    transport: str = "auto"
    stage_dir: Path | None = None
    blocks: int = 1
    verify_download: bool = False

    @property
    def needs_no_optimizer(self) -> bool:
        """Whether nothing that is sent comes from the optimizer's files."""
        wants_16bit = self.request is not None and self.request.weights == "16bit"
        return wants_16bit and not self.training_state

    @property
    def place(self) -> str:
        """The folder of the repository, "" or with a "/" at its end."""
        return f"{self.path_in_repo.strip('/')}/" if self.path_in_repo else ""

    @property
    def branch(self) -> str:
        """The branch that the commit is for."""
        return self.revision or repository.MAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """A push decided on but not begun.

    ``deleted`` are names in the repository that the commit removes; a folder's ends in
    "/". ``message`` is that of the commit.
    """

    checkpoint: RunCheckpoint
    contents: Contents
    remote: Remote
    options: PushOptions
    deleted: tuple[str, ...]
    transport: Transport
    message: str
    warnings: tuple[str, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """The files to send."""
        return self.contents.items

    @property
    def place(self) -> str:
        """The folder of the repository, "" or with a "/" at its end."""
        return self.options.place

    @property
    def private(self) -> bool | None:
        """Whether the repository is private, or will be."""
        return self.options.private if self.remote.head is None else self.remote.private


def plan(checkpoint: RunCheckpoint, repo: str, options: PushOptions) -> PushPlan:
    """Looks at the checkpoint, then at the repository, and decides; changes nothing.

    ``CheckpointError`` for what is not whole, does not fit the Hub, or may not be
    published there.
    """
    _require_names(repo, options.path_in_repo)
    _require_branch(options.revision)
    with open_files.once():  # what is checked is parsed for what is sent, too
        wholeness.require(checkpoint, options.uncommitted, options.needs_no_optimizer)
        errors.require_client()
        _require_steps(options)
        transport, note = upload.choose(options.transport, options.stage_dir)
        local_contents = _contents(checkpoint, repo, options)  # what is wrong needs no network

    with errors.translate_errors(repo):
        remote = repository.look(api_for(), repo, options.branch)

    push_contents = _beside_card(local_contents, remote, options)
    require_open(remote, options)

    notices = [note] if note else []
    if remote.private is False and options.private:
        notices.append(f"{repo} is public, and stays so")

    return PushPlan(
        checkpoint=checkpoint,
        contents=push_contents,
        remote=remote,
        options=options,
        deleted=_deleted_names(remote, push_contents, options),
        transport=transport,
        message=options.message or _message(checkpoint, push_contents, options),
        warnings=(*notices, *push_contents.warnings),
    )


def _contents(checkpoint: RunCheckpoint, repo: str, options: PushOptions) -> Contents:
    """The files that are sent to a repository without a card."""
    return contents(
        checkpoint,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        training_state=options.training_state,
        repo=repo,
        revision=options.revision,
        request=options.request,
    )


def _beside_card(local_contents: Contents, remote: Remote, options: PushOptions) -> Contents:
    """The files that are sent to the repository as it is: a card that it has stays."""
    has_card = options.place + CARD in remote.files
    if not has_card or options.training_state:
        return local_contents

    card_names = {CARD, *local_contents.made_names}
    items = tuple(item for item in local_contents.items if item.name not in card_names)
    return replace(local_contents, items=items, made_names=())


def _deleted_names(
    remote: Remote, push_contents: Contents, options: PushOptions
) -> tuple[str, ...]:
    """The files and folders that the commit removes: of older pushes to the same place."""
    place = options.place
    sent_names = {place + item.name for item in push_contents.items}
    deleted_names = repository.stale(remote.files, sent_names, place)
    if options.training_state:
        older_names = _listed_before(remote, place)
        deleted_names += [name for name in older_names if name not in sent_names]
    if options.keep_last and place and not remote.new:
        folders = _siblings(remote.files, place)
        deleted_names += [
            f"{name}/" for name in repository.outdated(folders, place[:-1], options.keep_last)
        ]

    return tuple(sorted(set(deleted_names)))


def _message(checkpoint: RunCheckpoint, push_contents: Contents, options: PushOptions) -> str:
    step_text = f", step {checkpoint.step}" if checkpoint.step is not None else ""
    dtype = push_contents.facts["dtype"]
    content = "as stored" if dtype == "keep" else dtype
    content = "training state" if options.training_state else content
    return f"Push {checkpoint.name} ({content}{step_text}) with ckpt {__version__}"


def api_for() -> HfApi:
    """The client, with the login that it finds itself."""
    from huggingface_hub import HfApi

    return HfApi(library_name="ckpt", library_version=__version__)


def _require_names(repo: str, path_in_repo: str | None) -> None:
    if len(repo.split("/")) != 2 or not all(repo.split("/")):
        raise CheckpointError(f"{repo!r} is not a repository; write org/name", "refused")
    if path_in_repo and (fault := unfit(path_in_repo.strip("/"))):
        raise CheckpointError(f"{PATH_IN_REPO(path_in_repo)} {fault}", "refused")


def _require_branch(name: str | None) -> None:
    """``CheckpointError`` for what git takes for no name of a branch (git check-ref-format)."""
    if name is not None and _UNFIT_BRANCH.search(name):
        raise CheckpointError(
            f"{REVISION(name)} is not the name of a branch: it has a space or another character "
            "that git does not allow; write step-500",
            "refused",
        )


def _require_steps(options: PushOptions) -> None:
    keep_last = options.keep_last
    if keep_last is None:
        return

    place_name = options.place.rstrip("/") or options.revision or ""
    if keep_last < 1 or not repository.is_step(place_name):
        raise CheckpointError(
            f"{KEEP_LAST(keep_last)} needs {REVISION} or {PATH_IN_REPO}, such as "
            "step-500, whose older steps it deletes",
            "refused",
        )


def require_open(remote: Remote, options: PushOptions) -> None:
    """``CheckpointError`` for what may not come into this repository, or this way."""
    is_public = remote.private is False if remote.head else not options.private
    if options.training_state and is_public:
        raise CheckpointError(
            f"{remote.repo} is public; {INCLUDE_TRAINING_STATE} goes into private "
            "repositories only",
            "refused",
        )

    lacks_branch = remote.new or (remote.head is None and remote.branch != repository.MAIN)
    if options.create_pr and lacks_branch:
        raise CheckpointError(
            f"{remote.repo} has no branch {remote.branch}; a pull request needs one that is there",
            "refused",
        )


def _siblings(file_names: Iterable[str], place: str) -> set[str]:
    """The folders beside ``place`` ("a/step-5/": "a/step-1", "a/step-2" ...)."""
    depth = place.count("/")
    return {
        "/".join(file_name.split("/")[:depth])
        for file_name in file_names
        if file_name.count("/") >= depth
    }


def _listed_before(remote: Remote, place: str) -> Iterator[str]:
    """Files that the manifest of an older training state at this place lists."""
    path_in_repo = place + MANIFEST
    if path_in_repo not in remote.files:
        return

    from huggingface_hub import hf_hub_download

    with errors.translate_errors(remote.repo):
        local_copy = Path(hf_hub_download(remote.repo, path_in_repo, revision=remote.head))
    try:
        listed_files = manifest.loads(local_copy.read_bytes(), local_copy).files
    except CheckpointError:
        return  # no manifest of ours

    yield from (
        place + name for name in listed_files if name != CARD and place + name in remote.files
    )
