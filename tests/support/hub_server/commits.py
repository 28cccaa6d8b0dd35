"""What is each file (preupload), and the commit: operations applied whole or not at all."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from pathspec import GitIgnoreSpec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import needs_user, param, repo, server
from .attributes import REGULAR_LIMIT, is_lfs, lfs_spec, with_lfs
from .errors import HubError
from .repos import PULLS, TAGS, Entry, Repo, blob_oid, lfs_entry
from .store import Store

ATTRIBUTES, IGNORE = ".gitattributes", ".gitignore"
MOVED = "A commit has happened since. Please refresh and try again."
NO_CONTENT = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist."
    " For instance, this can happen if you used git push --no-verify to push your changes."
)
TOO_LARGE = (
    "Your push was rejected because it contains files larger than 10 MiB. Please use git-lfs"
)
UNSAFE = re.compile(r"(^|/)(\.{0,2}|\.git)(/|$)|[\x00-\x1f\\]")  # of a path in a repository


def text(store: Store, files: Mapping[str, Entry], path: str) -> str:
    """A small file of a commit, empty if it has none."""
    return b"".join(store.read(files[path].sha256)).decode() if path in files else ""


async def preupload(request: Request) -> Response:
    # A pull request needs only the right to read.
    found = repo(request, write="create_pr" not in request.query_params)
    needs_user(request)
    asked, store = await request.json(), server(request).store
    files = found.at(param(request, "revision")).files
    attributes = lfs_spec(text(store, files, ATTRIBUTES))
    ignore = asked.get("gitIgnore") or text(store, files, IGNORE)
    ignored = GitIgnoreSpec.from_lines(ignore.splitlines())
    answers = []
    for file in asked["files"]:
        path, size = file["path"], file["size"]
        lfs = is_lfs(path, size, base64.b64decode(file["sample"]), attributes)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
        answer["shouldIgnore"] = ignored.match_file(path)
        if path in files:
            answer["oid"] = files[path].sha256 if files[path].lfs else files[path].oid
        answers.append(answer)
    return JSONResponse({"files": answers})


def _file(store: Store, files: dict[str, Entry], value: dict[str, Any]) -> None:
    data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else None
    data = value["content"].encode() if data is None else data
    if len(data) > REGULAR_LIMIT:
        raise HubError(400, f"{TOO_LARGE}. Offending files: {value['path']}")
    files[value["path"]] = Entry(blob_oid(data), len(data), store.put(data), False)


async def _prove(store: Store, lines: list[dict[str, Any]]) -> None:
    """Reads what the LFS files of a commit point at."""
    for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
        size, proven = store.size(value["oid"]), await asyncio.to_thread(store.prove, value["oid"])
        if not proven or value.get("size", size) != size:
            raise HubError(400, f"{NO_CONTENT} Offending file: {value['path']}")


def _lfs_file(store: Store, files: dict[str, Entry], value: dict[str, Any]) -> None:
    size = store.size(value["oid"])
    assert size is not None
    files[value["path"]] = lfs_entry(value["oid"], size)


def _delete(files: dict[str, Entry], path: str, folder: bool) -> None:
    gone = [p for p in files if (p.startswith(path.rstrip("/") + "/") if folder else p == path)]
    if not gone:
        kind = "folder" if folder else "file"
        raise HubError(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
    for name in gone:
        del files[name]


def _copy(found: Repo, base: str, files: dict[str, Entry], value: dict[str, Any]) -> None:
    source = found.at(value.get("srcRevision") or base).files
    if value["srcPath"] not in source:
        raise HubError(
            404, f"A file with this name doesn't exist: {value['srcPath']}", "EntryNotFound"
        )
    files[value["path"]] = source[value["srcPath"]]


def _applied(found: Repo, base: str, store: Store, lines: list[dict[str, Any]]) -> dict[str, Entry]:
    """The tree after the operations, on top of the commit ``base``."""
    files = dict(found.commit(base).files)
    new_lfs = []
    for line in lines:
        value = line["value"]
        if UNSAFE.search(value["path"].rstrip("/")):
            raise HubError(400, f"Invalid path in commit: {value['path']}")
        match line["key"]:
            case "file":
                _file(store, files, value)
            case "lfsFile":
                _lfs_file(store, files, value)
                new_lfs.append(value["path"])
            case "deletedFile":
                _delete(files, value["path"], folder=False)
            case "deletedFolder":
                _delete(files, value["path"], folder=True)
            case "copyFile":
                _copy(found, base, files, value)
            case other:
                raise HubError(400, f"Unknown operation in commit: {other}")
    old = text(store, files, ATTRIBUTES)
    new = with_lfs(old, new_lfs).encode()
    if new != old.encode():
        files[ATTRIBUTES] = Entry(blob_oid(new), len(new), store.put(new), False)
    return files


async def commit(request: Request) -> Response:
    pull = "create_pr" in request.query_params
    repo(request, write=not pull)
    who, store = needs_user(request), server(request).store
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "A commit begins with a header that has a summary")
    header, operations = lines[0]["value"], lines[1:]
    await _prove(store, operations)
    # No await from here on: the head cannot move.
    found, revision, parent = repo(request), param(request, "revision"), header.get("parentCommit")
    ref, base = found.resolve(revision)
    if pull:
        base = base if parent is None else found.resolve(parent)[1]
        found.state["pulls"] += 1
        ref = f"{PULLS}{found.state['pulls']}"
    elif ref is None or ref.startswith(TAGS):
        raise HubError(400, f"Cannot commit to {revision}: it is not a branch")
    elif parent not in (None, base):
        raise HubError(412, MOVED)
    files = _applied(found, base, store, operations)
    oid = base
    if pull or files != found.commit(base).files:
        message = header.get("description") or ""
        oid = found.add(files, base, header["summary"], message, who.name)
        found.move(ref, oid)
    url = str(request.base_url) + found.name
    answer = {
        "success": True,
        "commitOid": oid,
        "commitUrl": f"{url}/commit/{oid}",
        "hookOutput": "",
    }
    if pull:
        answer["pullRequestUrl"] = f"{url}/discussions/{ref.removeprefix(PULLS)}"
    return JSONResponse(answer)
