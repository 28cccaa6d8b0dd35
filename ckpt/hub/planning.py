"""A push decided on: what is in the repository, what comes, and what goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt import __version__
from ckpt.hub import refusals, remote, sending
from ckpt.hub.allowed import CARD
from ckpt.hub.contents import Contents, contents
from ckpt.hub.items import Item, unfit
from ckpt.hub.remote import Remote
from ckpt.hub.sending import Way
from ckpt.runs import manifest, verify
from ckpt.runs.run import Checkpoint
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True, slots=True)
class Planned:
    """A push decided on but not begun.

    ``deleted`` are names in the repository that the commit removes; a folder's ends in "/".
    ``place`` is the folder of the repository, "" or with a "/" at its end.
    """

    checkpoint: Checkpoint
    contents: Contents
    seen: Remote
    place: str
    deleted: tuple[str, ...]
    way: Way
    message: str
    private: bool
    create_pr: bool
    warnings: tuple[str, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """The files to send."""
        return self.contents.items

    def facts(self) -> dict[str, Any]:
        """The plan as plain data."""
        seen, held = self.seen, self.contents
        return {
            "dry_run": True,
            "repo": seen.repo,
            "revision": seen.branch,
            "exists": seen.head is not None,
            "private": self.private if seen.head is None else seen.private,
            "new_revision": seen.new,
            "checkpoint": str(self.checkpoint.folder),
            "step": self.checkpoint.step,
            "transport": self.way,
            "message": self.message,
            "nbytes": held.nbytes,
            "files": [{"name": self.place + i.name, "size": i.nbytes} for i in self.items],
            "deleted": list(self.deleted),
            "left_out": [{"name": name, "why": why} for name, why in held.left_out],
            "warnings": list(self.warnings),
        }


def plan_push(
    checkpoint: Checkpoint,
    repo: str,
    *,
    dtype: str = "fp32",
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    private: bool = True,
    path_in_repo: str | None = None,
    max_shard_size: int = 5_000_000_000,
    training_state: bool = False,
    uncommitted: bool = False,
    stage_dir: Path | None = None,
    keep_last: int | None = None,
    transport: str = "auto",
) -> Planned:
    """Looks at the checkpoint and the repository, and decides; changes nothing.

    ``revision`` is a branch (main), made by the push where there is none; ``private`` counts only
    where the repository is made. ``CheckpointError`` for what is not committed, does not fit the
    Hub, or may not be published there.
    """
    _require_names(repo, path_in_repo)
    _require_committed(checkpoint, uncommitted)
    refusals.require_client()
    place = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    branch = revision or remote.MAIN
    _require_steps(keep_last, revision, path_in_repo)
    way, note = sending.choose(transport, stage_dir)
    with refusals.told(repo):
        seen = remote.look(api_for(), repo, branch)
    held = contents(
        checkpoint,
        dtype=dtype,
        max_shard_size=max_shard_size,
        training_state=training_state,
        card=place + CARD not in seen.files,
        repo=repo,
        revision=revision,
    )
    if place + CARD in seen.files and not training_state:  # a repository's card stays as it is
        held = replace(held, items=tuple(item for item in held.items if item.name != CARD))
    require_open(seen, private, training_state, create_pr)
    names = {place + item.name for item in held.items}
    deleted = remote.stale(seen.files, names, place)
    if training_state:
        deleted += [name for name in _listed_before(seen, place) if name not in names]
    if keep_last and place and not seen.new:
        folders = _siblings(seen.files, place)
        deleted += [f"{name}/" for name in remote.outdated(folders, place[:-1], keep_last)]
    talk = [note] if note else []
    if seen.private is False and private:
        talk.append(f"{repo} is public, and stays so")
    step = f", step {checkpoint.step}" if checkpoint.step is not None else ""
    kind = "training state" if training_state else dtype
    return Planned(
        checkpoint,
        held,
        seen,
        place,
        tuple(sorted(set(deleted))),
        way,
        message or f"Push {checkpoint.name} ({kind}{step}) with ckpt {__version__}",
        private,
        create_pr,
        (*talk, *held.warnings),
    )


def api_for() -> HfApi:
    """The client, with the login that it finds itself."""
    from huggingface_hub import HfApi

    return HfApi(library_name="ckpt", library_version=__version__)


def _require_names(repo: str, path_in_repo: str | None) -> None:
    if len(repo.split("/")) != 2 or not all(repo.split("/")):
        raise CheckpointError(f"{repo!r} is no repository; write org/name", "refused")
    if path_in_repo and (why := unfit(path_in_repo.strip("/"))):
        raise CheckpointError(f"--path-in-repo {path_in_repo!r} {why}", "refused")


def _require_committed(checkpoint: Checkpoint, uncommitted: bool) -> None:
    """``CheckpointError`` unless the checkpoint is committed, and whole as far as sizes tell."""
    if checkpoint.why == manifest.ABSENT:
        if uncommitted:
            return
        raise CheckpointError(
            f"{checkpoint.folder} has {manifest.ABSENT}; ckpt doctor {checkpoint.folder.parent} "
            "--adopt commits it if it is whole, --uncommitted pushes it with the conversion's own "
            "proof alone",
            "incomplete",
        )
    verdict = verify.verify(checkpoint)
    if not verdict.whole:
        why = checkpoint.why or verdict.problems[0]
        raise CheckpointError(
            f"{checkpoint.folder} is not whole: {why}; choose another checkpoint", "incomplete"
        )


def _require_steps(keep_last: int | None, revision: str | None, path_in_repo: str | None) -> None:
    if keep_last is None:
        return
    named = path_in_repo.strip("/") if path_in_repo else revision or ""
    if keep_last < 1 or not remote.is_step(named):
        raise CheckpointError(
            f"--keep-last {keep_last} needs a --revision or --path-in-repo such as step-500, whose "
            "older steps it deletes",
            "refused",
        )


def require_open(seen: Remote, private: bool, training_state: bool, create_pr: bool) -> None:
    """``CheckpointError`` for what may not come into this repository, or this way."""
    public = seen.private is False if seen.head else not private
    if training_state and public:
        raise CheckpointError(
            f"{seen.repo} is public; --include-training-state goes into private repositories only",
            "refused",
        )
    if create_pr and (seen.new or (seen.head is None and seen.branch != remote.MAIN)):
        raise CheckpointError(
            f"{seen.repo} has no branch {seen.branch}; a pull request needs one that is there",
            "refused",
        )


def _siblings(names: Iterable[str], place: str) -> set[str]:
    """The folders beside ``place`` ("a/step-5/": "a/step-1", "a/step-2" ...)."""
    depth = place.count("/")
    return {"/".join(n.split("/")[:depth]) for n in names if n.count("/") >= depth}


def _listed_before(seen: Remote, place: str) -> Iterator[str]:
    """Files that the manifest of an older training state at this place lists."""
    path = place + manifest.NAME
    if path not in seen.files:
        return
    from huggingface_hub import hf_hub_download

    with refusals.told(seen.repo):
        local = Path(hf_hub_download(seen.repo, path, revision=seen.head))
    try:
        listed = manifest.loads(local.read_bytes(), local).files
    except CheckpointError:
        return  # no manifest of ours
    yield from (place + name for name in listed if name != CARD and place + name in seen.files)
