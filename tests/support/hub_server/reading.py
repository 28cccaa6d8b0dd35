"""What a reader asks: revision, tree, paths-info, commits, and the files over ``resolve``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha1
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .access import param, repo, server
from .cards import metadata
from .commits import text
from .errors import HubError, no_entry
from .lfs import storage
from .repos import Commit, Entry, Repo, lfs_pointer


def paged(request: Request, items: list[Any]) -> Response:
    """One page of a list; the next one's address in Link."""
    start, page = int(request.query_params.get("cursor", 0)), server(request).page
    headers = {}
    if start + page < len(items):
        query = {**request.query_params, "cursor": start + page}
        address = f"{str(request.base_url)[:-1]}{request.scope['path']}?{urlencode(query)}"
        headers["Link"] = f'<{address}>; rel="next"'
    return JSONResponse(items[start : start + page], headers=headers)


def entry(request: Request, path: str, file: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        pointer = len(lfs_pointer(file.sha256, file.size))
        found["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer}
        if (xet := server(request).store.xet_file(file.sha256)) is not None:
            found["xetHash"] = xet.hash
    return found


def directory(path: str, files: dict[str, Entry]) -> dict[str, Any]:
    inside = [f"{p} {f.oid}" for p, f in sorted(files.items()) if p.startswith(path + "/")]
    oid = sha1("\n".join(inside).encode()).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def listing(
    request: Request, files: dict[str, Entry], recursive: bool, top: str
) -> list[dict[str, Any]]:
    """The files and folders below ``top``, sorted by path."""
    prefix = f"{top}/" if top else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if top and not inside:
        raise no_entry(top)
    folders = set()
    for path in inside:
        parts = path[len(prefix) :].split("/")[:-1]
        folders |= {prefix + "/".join(parts[: n + 1]) for n in range(len(parts))}
    found = [directory(path, files) for path in folders]
    found += [entry(request, path, file) for path, file in inside.items()]
    if not recursive:
        found = [item for item in found if "/" not in item["path"][len(prefix) :]]
    return sorted(found, key=lambda item: str(item["path"]))


def with_last_commit(found: Repo, commit: Commit, items: list[dict[str, Any]]) -> None:
    history = found.history(commit.oid)
    for item in items:
        newest, prefix = history[0], item["path"] + "/"
        for older in history[1:]:
            if _below(newest, item["path"], prefix) != _below(older, item["path"], prefix):
                break
            newest = older
        item["lastCommit"] = {"id": newest.oid, "title": newest.title, "date": newest.date}


def _below(commit: Commit, path: str, prefix: str) -> dict[str, Entry]:
    return {p: f for p, f in commit.files.items() if p == path or p.startswith(prefix)}


async def tree(request: Request) -> Response:
    found = repo(request)
    commit = found.at(param(request, "revision"))
    recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
    top = param(request, "path").strip("/") if "path" in request.path_params else ""
    items = listing(request, dict(commit.files), recursive, top)
    if request.query_params.get("expand", "").lower() in ("true", "1"):
        with_last_commit(found, commit, items)
    return paged(request, items)


async def paths_info(request: Request) -> Response:
    found = repo(request)
    commit = found.at(param(request, "revision"))
    form = parse_qs((await request.body()).decode())
    files, items = dict(commit.files), []
    for path in (value.strip("/") for value in form.get("paths", [])):
        if path in files:
            items.append(entry(request, path, files[path]))
        elif any(name.startswith(path + "/") for name in files):
            items.append(directory(path, files))
    if form.get("expand", [""])[0].lower() in ("true", "1"):
        with_last_commit(found, commit, items)
    return JSONResponse(items)


async def info(request: Request) -> Response:
    found = repo(request)
    commit = found.at(param(request, "revision") if "revision" in request.path_params else "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if "blobs" in request.query_params:
        for sibling, (path, file) in zip(siblings, commit.files.items(), strict=True):
            shown = entry(request, path, file)
            sibling |= {"size": file.size, "blobId": file.oid}
            if file.lfs:
                sibling["lfs"] = shown["lfs"] | {"sha256": file.sha256}
    card, _ = metadata(text(server(request).store, commit.files, "README.md"))
    body = {
        "id": found.name,
        "modelId": found.name,
        "author": found.name.split("/")[0],
        "sha": commit.oid,
        "private": found.state["visibility"] == "private",
        "gated": found.state["gated"],
        "disabled": False,
        "createdAt": found.state["created"],
        "lastModified": found.state["modified"],
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }
    return JSONResponse(body | ({"cardData": card} if card else {}))


async def commits(request: Request) -> Response:
    shown = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repo(request).history(param(request, "revision"))
    ]
    return paged(request, shown)


async def resolve(request: Request) -> Response:
    """A small file itself; an LFS file's address, with what the client checks it by.

    The address is on another host than the API: the client follows a redirect to its own host
    and then looks for X-Repo-Commit there.
    """
    found = repo(request)
    commit, path = found.at(param(request, "revision")), param(request, "path")
    if path not in commit.files:
        raise no_entry(path)
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if not file.lfs:
        return content(request, file.sha256, headers | {"ETag": f'"{file.oid}"'})
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    headers |= {"ETag": f'"{file.oid}"', "Location": f"{storage(request)}/cdn/{file.sha256}"}
    if (xet := server(request).store.xet_file(file.sha256)) is not None:
        kind = request.path_params.get("kind", "models")
        token = f"{request.base_url}api/{kind}/{found.name}/xet-read-token/{quote(commit.oid)}"
        headers |= {"X-Xet-Hash": xet.hash, "Link": f'<{token}>; rel="xet-auth"'}
    return Response(status_code=302, headers=headers)


async def cdn(request: Request) -> Response:
    sha256 = request.path_params["sha256"]
    return content(request, sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def content(request: Request, sha256: str, headers: dict[str, str]) -> Response:
    """The bytes, or the one range asked for."""
    store = server(request).store
    size = store.size(sha256)
    if size is None:
        raise HubError(404, "NoSuchKey")
    start, end, status = 0, size, 200
    if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "")):
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last or 0), 0)
        end = min(int(last) + 1, size) if first and last else size
        if start >= end:
            wrong = {"Content-Range": f"bytes */{size}"}
            raise HubError(416, "Requested range not satisfiable", headers=wrong)
        status = 206
        headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
    headers = headers | {"Content-Length": str(end - start)}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    pieces: Iterator[bytes] = store.read(sha256, start, end)
    return StreamingResponse(pieces, status, headers, "application/octet-stream")
