"""The contents of a repository, seen before and after a push;
and which of them a push replaces.

Names are posix paths from the repository's root. The functions over names are pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.hub.client.retry import retry
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
SOON = (1.0, 2.0)  # seconds that a first request waits: nothing would be lost
_FULL = LazyPattern(
    r"(?:model|pytorch_model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.json"
)
_ADAPTER = LazyPattern(r"adapter_model\.(?:safetensors|bin)")
_STEP = LazyPattern(r"((?:.*[-_/])?step-)(\d{1,18})")
_BLOCK = 1 << 20  # bytes of a file read at once


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the repository: bytes,
    and the SHA-256 of its content or its git blob's SHA-1."""

    size: int
    sha256: str | None
    blob: str

    def is_content(self, size: int, sha256: str, source: Path | bytes | None) -> bool:
        """Whether this is the file; ``source`` is read where git has it as a blob."""
        if self.size != size:
            return False
        if self.sha256 is not None:
            return self.sha256 == sha256
        return source is not None and self.blob == git_blob(source)

    def is_known(self, size: int, sha256: str, blob: str | None) -> bool:
        """Whether this is the file, by what was computed of it before."""
        known_digest = sha256 if self.sha256 is not None else blob
        return self.size == size and known_digest == (self.sha256 or self.blob)


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository and one of its branches.

    ``head`` is the commit that a push builds on: the branch's, or main's where there is
    no such branch yet (``new``). ``private`` and ``head`` are ``None`` for a repository
    that is not there.
    """

    repo: str
    branch: str
    private: bool | None = None
    head: str | None = None
    new: bool = False
    files: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The branch that uploads are announced for: one that is there."""
        return MAIN if self.new else self.branch


def look(api: HfApi, repo: str, branch: str) -> Remote:
    """Returns what is there now.
    A repository that this login may not see counts as not there."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        repo_info = retry(lambda: api.repo_info(repo, revision=branch), SOON)
        is_new = False
    except RevisionNotFoundError:
        repo_info = retry(lambda: api.repo_info(repo, revision=MAIN), SOON)
        is_new = True
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 or get_token() is None:
            raise
        return Remote(repo, branch)

    head = str(repo_info.sha)

    return Remote(
        repo,
        branch,
        bool(repo_info.private),
        head,
        is_new,
        files(api, repo, head),
    )


def files(api: HfApi, repo: str, revision: str) -> dict[str, RemoteFile]:
    """Every file of a revision."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(repo, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def sha256(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes."""
    return _hexdigest(hashlib.sha256(), source)


def git_blob(source: Path | bytes) -> str:
    """The SHA-1 by which git knows the content."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    return _hexdigest(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), source)


def _hexdigest(hasher: hashlib._Hash, source: Path | bytes) -> str:
    if isinstance(source, bytes):
        hasher.update(source)
        return hasher.hexdigest()

    try:
        with open(source, "rb") as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
    except OSError as error:
        raise CheckpointError(f"{source}: {error.strerror}", "incomplete") from error

    return hasher.hexdigest()


def stale(
    present_names: Iterable[str],
    sent_names: Collection[str],
    place: str = "",
) -> list[str]:
    """Weights of an older push that ``sent_names`` does not replace.

    They are of another number of shards, or an index. Looks at the files right in
    ``place`` ("" or "step-500/"), and only at names that pushes of weights make, of the
    kind that is sent: a user's own files are never among them.
    """
    name_patterns = [
        pattern
        for pattern in (_FULL, _ADAPTER)
        if any(_is_at(file_name, place, pattern) for file_name in sent_names)
    ]
    return sorted(
        file_name
        for file_name in present_names
        if file_name not in sent_names
        and any(_is_at(file_name, place, pattern) for pattern in name_patterns)
    )


def _is_at(file_name: str, place: str, pattern: LazyPattern[str]) -> bool:
    is_inside = file_name.startswith(place)

    return is_inside and pattern.fullmatch(file_name[len(place) :]) is not None


def is_step(name: str) -> bool:
    """Whether retention goes by this name: step-500, run-7/step-500."""
    return _STEP.fullmatch(name) is not None


def outdated(names: Iterable[str], pushed: str, kept_count: int) -> list[str]:
    """Which of ``names`` go when ``pushed`` ("step-500") came
    and ``kept_count`` are to stay.

    Only those spelt like it (the same text before the number) of a lower step; itself
    counts as one of those kept. ``ValueError`` where the name has no step, or for
    ``kept_count`` below 1.
    """
    pushed_match = _STEP.fullmatch(pushed)
    if pushed_match is None or kept_count < 1:
        raise ValueError(
            f"{pushed!r} is not like step-500, or {kept_count} is less than 1",
        )

    older_steps = []
    for name in set(names):
        match = _STEP.fullmatch(name)
        if match and match[1] == pushed_match[1] and int(match[2]) < int(pushed_match[2]):
            older_steps.append((int(match[2]), name))

    older_steps.sort(reverse=True)

    return [name for _, name in older_steps[kept_count - 1 :]]
