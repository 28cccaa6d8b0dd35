"""A checkpoint on the Hub: seen, planned, sent, committed once, and verified there.

    plan_push   what is there, what comes, what goes; sends nothing
    push        the same, then: every file to the Hub -> the proof of every byte -> one commit
                -> what the Hub holds compared with what was sent -> older steps deleted

A push that fails, or is killed, leaves the branch as it was. The same push again goes on with what
the Hub does not have, and does nothing where it has all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.hub import headers, journal, landing, patience, refusals, remote, sending
from ckpt.hub.allowed import CARD
from ckpt.hub.landing import Change, Landed
from ckpt.hub.planning import Planned, api_for, plan_push, require_open
from ckpt.hub.remote import Remote
from ckpt.hub.transport import Sent, Target
from ckpt.report import size
from ckpt.runs import locks, manifest
from ckpt.runs.run import Checkpoint
from converters.errors import CheckpointError
from converters.files import named
from converters.mover import Progress
from converters.served import Serving

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Planned", "Pushed", "execute", "plan_push", "push"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the Hub has now. ``seconds`` is the time of the whole push.

    ``outdated`` are branches that retention deleted; ``checks`` is what was proven of the weights.
    """

    planned: Planned
    landed: Landed
    sent: tuple[Sent, ...]
    outdated: tuple[str, ...]
    warnings: tuple[str, ...]
    checks: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for a reader."""
        sent = [one for one in self.sent if one.moved and one.operation is not None]
        there = len(self.sent) - len(sent)
        what = f"{len(sent)} files sent ({size(sum(one.nbytes for one in sent))})"
        old = f"; deleted {', '.join(self.outdated)}" if self.outdated else ""
        new = "" if self.landed.made else "; no commit was needed"
        return f"{what}, {there} were there, all verified on the Hub{new}{old}"

    def facts(self) -> dict[str, Any]:
        """The push as plain data."""
        planned, seen = self.planned, self.planned.seen
        return {
            "url": self.landed.url,
            "oid": self.landed.oid,
            "committed": self.landed.made,
            "pull_request": self.landed.pull_request,
            "repo": seen.repo,
            "revision": seen.branch,
            "checkpoint": str(planned.checkpoint.folder),
            "step": planned.checkpoint.step,
            "transport": planned.way,
            "files": [
                {
                    "name": one.path,
                    "size": one.nbytes,
                    "sha256": one.sha256,
                    "status": "sent" if one.moved and one.operation else "was there",
                }
                for one in self.sent
            ],
            "deleted": list(planned.deleted),
            "deleted_revisions": list(self.outdated),
            "left_out": [{"name": n, "why": why} for n, why in planned.contents.left_out],
            "checks": self.checks,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def push(
    checkpoint: Checkpoint,
    repo: str,
    *,
    verify_download: bool = False,
    keep_last: int | None = None,
    stage_dir: Path | None = None,
    blocks: int = 1,
    progress: Progress = lambda _: None,
    **options: Any,
) -> Pushed:
    """Publishes a checkpoint; the options are those of ``plan_push``.

    ``keep_last`` deletes branches of older steps after the commit. ``blocks`` of 64 MB may be on
    their way by Xet at once, each of which takes that much memory. ``progress`` gets bytes,
    ``planned.contents.nbytes`` in all. Raises ``CheckpointError``; then the branch is as it was,
    unless the line says otherwise.
    """
    begun = time.monotonic()
    with locks.reading(checkpoint.folder):
        planned = plan_push(checkpoint, repo, keep_last=keep_last, stage_dir=stage_dir, **options)
        return execute(
            planned,
            verify_download=verify_download,
            keep_last=keep_last,
            stage_dir=stage_dir,
            blocks=blocks,
            progress=progress,
            begun=begun,
        )


def execute(
    planned: Planned,
    *,
    verify_download: bool = False,
    keep_last: int | None = None,
    stage_dir: Path | None = None,
    blocks: int = 1,
    progress: Progress = lambda _: None,
    begun: float | None = None,
) -> Pushed:
    """Does what was planned; see ``push``."""
    begun = time.monotonic() if begun is None else begun
    repo, api = planned.seen.repo, api_for()
    with locks.reading(planned.checkpoint.folder), refusals.told(repo):
        for item in planned.items:
            item.require_whole()
        _require_card(planned)
        seen = _made(api, planned)
        target = Target(api, repo, seen.base, planned.create_pr, planned.place, blocks, seen.files)
        shards = _shards(planned)
        sent = sending.send(target, planned.items, shards, planned.way, stage_dir, progress)
        checks = _prove(planned, shards)
        change = Change(tuple(sent), planned.deleted, planned.message, planned.create_pr)
        try:
            landed = landing.land(api, seen, change)
        except Exception as error:
            if shards is not None and patience.status(error) in (400, 404, 422):
                shards[1].forget()  # perhaps the Hub does not have what it was said to have
            raise
        if verify_download:
            headers.compare(api, seen.repo, landed, planned.items, planned.place)
        outdated, talk = _retire(api, planned, keep_last)
    seconds = time.monotonic() - begun
    return Pushed(
        planned,
        landed,
        tuple(sent),
        outdated,
        (*planned.warnings, *talk),
        checks,
        seconds,
    )


def _require_card(planned: Planned) -> None:
    """``CheckpointError`` if the Hub would refuse the model card; before anything is sent."""
    from huggingface_hub import ModelCard

    for item in planned.items:
        if planned.place + item.name == CARD:
            text = item.source
            if isinstance(text, Path):
                with named(text):
                    text = text.read_bytes()
            assert isinstance(text, bytes)
            try:
                card = ModelCard(text.decode())
                patience.patient(partial(card.validate, repo_type="model"))
            except ValueError as error:
                raise CheckpointError(
                    f"{CARD} of {planned.checkpoint.folder}: the Hub refuses its metadata: {error}",
                    "refused",
                ) from error


def _made(api: HfApi, planned: Planned) -> Remote:
    """The repository as it is, or as it is when it was made just now."""
    if planned.seen.head is not None:
        return planned.seen
    repo = planned.seen.repo
    patience.patient(lambda: api.create_repo(repo, private=planned.private, exist_ok=True))
    seen = remote.look(api, planned.seen.repo, planned.seen.branch)
    if seen.head is None:
        raise CheckpointError(f"{seen.repo} was made and is not there; push again", "output")
    training_state = any(item.name == manifest.NAME for item in planned.items)
    require_open(seen, planned.private, training_state, planned.create_pr)
    return seen


def _shards(planned: Planned) -> tuple[Serving, journal.Journal] | None:
    conversion = planned.contents.conversion
    if conversion is None:
        return None
    serving = Serving(conversion.plan, conversion.strict)
    return serving, journal.opened(conversion.plan, serving)


def _prove(planned: Planned, shards: tuple[Serving, journal.Journal] | None) -> dict[str, Any]:
    """What was proven of the weights; ``CheckpointError`` if a CRC32 of their source is wrong."""
    conversion = planned.contents.conversion
    if shards is None or conversion is None:
        return {}
    serving, notes = shards
    if notes.proven:
        return {"verified": True, "earlier": True}
    try:
        report = serving.check()
    except CheckpointError:
        notes.forget()
        raise
    notes.prove(serving)
    return {
        "verified": True,
        "crc32_bytes": report.checked,
        "no_crc32_bytes": report.unchecked,
        "compared_with": conversion.proof,
        "compared_tensors": report.compared,
        "unlike_tensors": report.unlike,
    }


def _retire(
    api: HfApi, planned: Planned, keep_last: int | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Deletes branches of older steps; their names, and a line where that failed.

    The push is done by now, so that an error here is told and not raised.
    """
    if keep_last is None or planned.place or planned.create_pr:
        return (), ()
    done, repo = list[str](), planned.seen.repo
    try:
        branches = [
            ref.name for ref in patience.patient(partial(api.list_repo_refs, repo)).branches
        ]
        for name in remote.outdated(branches, planned.seen.branch, keep_last):
            patience.patient(partial(api.delete_branch, repo, branch=name))
            done.append(name)
    except Exception as error:
        line = refusals.said(repo, error)
        if line is None:
            raise
        return tuple(done), (f"older revisions are still there: {line}",)
    return tuple(done), ()
