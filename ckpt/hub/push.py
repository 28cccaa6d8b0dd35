"""A checkpoint on the Hub: seen, planned, sent, committed once, and verified there.

    plan      what is there, what comes, what goes; sends nothing
    execute   every file to the Hub -> the proof of every byte -> one commit
              -> what the Hub holds compared with what was sent -> older steps deleted

A push that fails, or is killed, leaves the branch as it was. The same push again goes
on with what the Hub does not have, and does nothing where it has all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.folders import locks
from ckpt.hub import commit, download_check, journal, upload
from ckpt.hub.client import errors, repository, retry
from ckpt.hub.client.repository import Remote
from ckpt.hub.client.xet import UploadedFile, UploadTarget
from ckpt.hub.commit import CommitChange, Committed
from ckpt.hub.content.allow_list import CARD
from ckpt.hub.plan import PushOptions, PushPlan, api_for, plan, require_open
from ckpt.results import WeightChecks
from ckpt.text import size
from ckpt.weights.conversion import comparison
from converters.errors import CheckpointError
from converters.execute.virtual_file import Serving
from converters.execute.workers import Progress
from converters.storage.local import naming_path
from converters.words import counted, verb

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["PushOptions", "PushPlan", "Pushed", "execute", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """The commit that the Hub has now. ``seconds`` is the time of ``execute``.

    ``outdated`` are branches that retention deleted; ``checks`` is what was proven of
    the weights, ``None`` if it has none that are converted.
    """

    push_plan: PushPlan
    committed: Committed
    files: tuple[UploadedFile, ...]
    outdated: tuple[str, ...]
    warnings: tuple[str, ...]
    checks: WeightChecks | None = None
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for a reader."""
        sent_files = [file for file in self.files if file.moved and file.operation is not None]
        present_count = len(self.files) - len(sent_files)
        were_verb = verb(present_count, "was", "were")
        sent_size = size(sum(file.nbytes for file in sent_files))
        sent_summary = f"{counted(len(sent_files), 'file')} sent ({sent_size})"
        deleted_note = f"; deleted {', '.join(self.outdated)}" if self.outdated else ""
        card_note = f"; its {CARD} stays as it is" if self._keeps_card else ""
        commit_note = "" if self.committed.is_new else "; no commit was needed"

        return (
            f"{sent_summary}, {present_count:,} {were_verb} there, "
            f"all verified on the Hub{card_note}{commit_note}{deleted_note}"
        )

    @property
    def _keeps_card(self) -> bool:
        """Whether the repository has a card, which no push replaces, among its files."""
        name = self.push_plan.place + CARD
        return name in self.push_plan.remote.files and all(file.path != name for file in self.files)


def execute(push_plan: PushPlan, progress: Progress = lambda _: None) -> Pushed:
    """Publishes the checkpoint as planned.

    ``progress`` gets bytes, ``contents.nbytes`` of the plan in all. Raises
    ``CheckpointError``; then the branch is as it was, unless the line says otherwise.
    """
    start_time = time.monotonic()
    repo, api = push_plan.remote.repo, api_for()
    with locks.reading(push_plan.checkpoint.folder), errors.translate_errors(repo):
        for item in push_plan.items:
            item.require_whole()
        _require_card(api, push_plan)
        remote = _ensure_repository(api, push_plan)

        shards = _serve_shards(push_plan)
        sent_files = upload.send(
            _upload_target(api, push_plan, remote),
            push_plan.items,
            shards,
            push_plan.transport,
            push_plan.options.stage_dir,
            progress,
        )
        checks = _prove(push_plan, shards)
        committed = _commit(api, push_plan, remote, sent_files, shards)

        if push_plan.options.verify_download:
            download_check.compare(api, remote.repo, committed, push_plan.items, push_plan.place)
        outdated_branches, notices = _retire(api, push_plan)

    return Pushed(
        push_plan=push_plan,
        committed=committed,
        files=tuple(sent_files),
        outdated=outdated_branches,
        warnings=(*push_plan.warnings, *notices),
        checks=checks,
        seconds=time.monotonic() - start_time,
    )


def _upload_target(api: HfApi, push_plan: PushPlan, remote: Remote) -> UploadTarget:
    options = push_plan.options
    return UploadTarget(
        api,
        remote.repo,
        remote.base,
        options.create_pr,
        options.place,
        options.blocks,
        remote.files,
    )


def _commit(
    api: HfApi,
    push_plan: PushPlan,
    remote: Remote,
    sent_files: Sequence[UploadedFile],
    shards: tuple[Serving, journal.Journal] | None,
) -> Committed:
    """Commits; what is known of shards is forgotten where the Hub refuses the commit."""
    change = CommitChange(
        tuple(sent_files),
        push_plan.deleted,
        push_plan.message,
        push_plan.options.create_pr,
    )
    try:
        return commit.commit(api, remote, change)
    except Exception as error:
        if shards is not None and retry.status(error) in (400, 404, 422):
            # perhaps the Hub does not have what it was said to have
            shards[1].forget()
        raise


def _require_card(api: HfApi, push_plan: PushPlan) -> None:
    """``CheckpointError`` if the Hub would refuse the model card;
    before anything is sent."""
    for item in push_plan.items:
        if push_plan.place + item.name == CARD:
            card_text = item.source
            if isinstance(card_text, Path):
                with naming_path(card_text):
                    card_text = card_text.read_bytes()

            assert isinstance(card_text, bytes)
            try:
                retry.retry(partial(_validate_card, api, card_text))
            except ValueError as error:
                folder = push_plan.checkpoint.folder
                raise CheckpointError(
                    f"{CARD} of {folder}: the Hub refuses its metadata: {error}",
                    "refused",
                ) from error


def _validate_card(api: HfApi, content: bytes) -> None:
    """Asks the Hub about a model card; ``ValueError`` if it would refuse it.

    As ``ModelCard.validate`` of huggingface_hub 2 does; that of older versions asks
    huggingface.co, also where the repository is on another Hub.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        get_session,
        hf_raise_for_status,
    )

    answer = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"repoType": "model", "content": str(ModelCard(content.decode()))},
        headers={"Accept": "text/plain"},
    )
    if answer.status_code == 400:
        raise ValueError(answer.text)
    hf_raise_for_status(answer)


def _ensure_repository(api: HfApi, push_plan: PushPlan) -> Remote:
    """The repository as it is, or as it is when it was made just now."""
    if push_plan.remote.head is not None:
        return push_plan.remote

    repo = push_plan.remote.repo
    retry.retry(lambda: api.create_repo(repo, private=push_plan.options.private, exist_ok=True))
    remote = repository.look(api, push_plan.remote.repo, push_plan.remote.branch)
    if remote.head is None:
        raise CheckpointError(
            f"{remote.repo} was made and is not there; push again",
            "output",
        )

    require_open(remote, push_plan.options)

    return remote


def _serve_shards(push_plan: PushPlan) -> tuple[Serving, journal.Journal] | None:
    conversion = push_plan.contents.conversion
    if conversion is None:
        return None
    serving = Serving(conversion.plan, conversion.strict, conversion.remedy(skips=False))
    return serving, journal.opened(conversion.plan, serving)


def _prove(
    push_plan: PushPlan,
    shards: tuple[Serving, journal.Journal] | None,
) -> WeightChecks | None:
    """Proves the weights; ``CheckpointError`` if a CRC32 of their source is wrong."""
    conversion = push_plan.contents.conversion
    if shards is None or conversion is None:
        return None

    serving, shard_journal = shards
    if shard_journal.proven:
        return WeightChecks(verified=True, earlier=True)

    try:
        report = serving.check()
    except CheckpointError:
        shard_journal.forget()
        raise

    shard_journal.prove(serving)
    return comparison.checks(conversion.product, conversion.plan, report)


def _retire(api: HfApi, push_plan: PushPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Deletes branches of older steps; their names, and a line where that failed.

    The push is done by now, so that an error here is told and not raised.
    """
    keep_last = push_plan.options.keep_last
    if keep_last is None or push_plan.place or push_plan.options.create_pr:
        return (), ()

    deleted_branches, repo = list[str](), push_plan.remote.repo
    try:
        branches = [
            branch.name for branch in retry.retry(partial(api.list_repo_refs, repo)).branches
        ]
        for branch_name in repository.outdated(branches, push_plan.remote.branch, keep_last):
            retry.retry(partial(api.delete_branch, repo, branch=branch_name))
            deleted_branches.append(branch_name)
    except Exception as error:
        failure = errors.translated(repo, error)
        if failure is None:
            raise
        return tuple(deleted_branches), (f"older revisions are still there: {failure}",)

    return tuple(deleted_branches), ()
