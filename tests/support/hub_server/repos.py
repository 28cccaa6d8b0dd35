"""Repositories on disk: ``repos/TYPE/OWNER/NAME/``, ``repo.json`` in it and ``commits/OID.json``.

A commit is a file with every path of its tree; a ref moves when repo.json is replaced. No lock:
the server changes repositories only between two awaits of its one event loop.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import sha1
from pathlib import Path
from typing import Any
from uuid import uuid4

from .errors import HubError, no_repo, no_revision
from .store import write_whole

KINDS = ("models", "datasets", "spaces")
HEADS, TAGS, PULLS = "refs/heads/", "refs/tags/", "refs/pr/"
NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
REF = re.compile(r"(?!.*(?:\.\.|//|@\{|\.lock$))[\w][\w./-]*(?<![./])", re.ASCII)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def blob_oid(data: bytes) -> str:
    """git's name of a file: SHA-1 over ``blob SIZE NUL`` and the bytes."""
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit. ``oid`` is git's: of the bytes, or of the pointer of an LFS file."""

    oid: str
    size: int
    sha256: str
    lfs: bool


def lfs_pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(blob_oid(lfs_pointer(sha256, size)), size, sha256, True)


@dataclass(frozen=True, slots=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]


class Repo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "repo.json").read_bytes())

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def refs(self) -> dict[str, str]:
        refs: dict[str, str] = self.state["refs"]
        return refs

    def save(self) -> None:
        write_whole(self.folder / "repo.json", json.dumps(self.state, indent=1).encode())

    def resolve(self, revision: str) -> tuple[str | None, str]:
        """Of a branch, tag, ref or commit: its ref, if it is one, and the commit's oid."""
        for ref in (HEADS + revision, TAGS + revision, revision):
            if ref in self.refs:
                return ref, self.refs[ref]
        if re.fullmatch("[0-9a-f]{40}", revision) and self._path(revision).is_file():
            return None, revision
        raise no_revision(revision)

    def commit(self, oid: str) -> Commit:
        stored = json.loads(self._path(oid).read_bytes())
        return Commit(**stored | {"files": {k: Entry(**v) for k, v in stored["files"].items()}})

    def at(self, revision: str) -> Commit:
        return self.commit(self.resolve(revision)[1])

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commit(parent))
        return commits

    def add(
        self,
        files: Mapping[str, Entry],
        parent: str | None,
        title: str,
        message: str,
        author: str,
        date: str | None = None,
    ) -> str:
        """Writes a commit, which no ref names yet."""
        body = {
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": date or now(),
            "files": {name: asdict(files[name]) for name in sorted(files)},
        }
        oid = sha1(uuid4().bytes + json.dumps(body).encode()).hexdigest()
        write_whole(self._path(oid), json.dumps({"oid": oid, **body}, indent=1).encode())
        return oid

    def move(self, ref: str, oid: str | None) -> None:
        """Points a ref at a commit, or drops it."""
        if oid is None:
            del self.refs[ref]
        else:
            self.refs[ref] = oid
        self.state["modified"] = now()
        self.save()

    def _path(self, oid: str) -> Path:
        return self.folder / "commits" / f"{oid}.json"


class Repos:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repos"

    def _path(self, kind: str, name: str) -> Path:
        if kind not in KINDS or not all(NAME.fullmatch(part) for part in name.split("/")):
            raise no_repo()
        return self.folder / kind / name

    def get(self, kind: str, name: str) -> Repo:
        try:
            return Repo(self._path(kind, name))
        except FileNotFoundError:
            raise no_repo() from None

    def create(self, kind: str, name: str, visibility: str, first: Mapping[str, Entry]) -> Repo:
        path = self._path(kind, name)
        if (path / "repo.json").exists():
            raise HubError(409, f"You already created this {kind[:-1]} repo: {name}")
        state = {"visibility": visibility, "gated": False, "refs": {}}
        state |= {"created": now(), "modified": now(), "pulls": 0}
        write_whole(path / "repo.json", json.dumps(state).encode())
        repo = Repo(path)
        repo.move(HEADS + "main", repo.add(first, None, "initial commit", "", name.split("/")[0]))
        return repo

    def delete(self, kind: str, name: str) -> None:
        shutil.rmtree(self.get(kind, name).folder)
