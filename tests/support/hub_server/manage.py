"""Repositories, refs and history: what the client calls besides files and commits."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import cas
from .access import allowed, needs_user, param, repo, server, whoami
from .attributes import INITIAL
from .commits import ATTRIBUTES
from .errors import HubError, no_revision
from .reading import paged
from .repos import HEADS, PULLS, REF, TAGS, Entry, Repo, blob_oid

TOKEN_SECONDS = 3600


async def who(request: Request) -> Response:
    return JSONResponse(whoami(needs_user(request)))


async def reread(request: Request) -> Response:
    """Not of the Hub: the test has changed the folder."""
    server(request).store.reread()
    return Response()


async def create(request: Request) -> Response:
    asked, caller, hub = await request.json(), needs_user(request), server(request)
    owner, kind = asked.get("organization") or caller.name, f"{asked.get('type') or 'model'}s"
    name = f"{owner}/{asked['name']}"
    allowed(caller, owner, kind)
    url = f"{request.base_url}{'' if kind == 'models' else kind + '/'}{name}"
    data = INITIAL.encode()
    first = {ATTRIBUTES: Entry(blob_oid(data), len(data), hub.store.put(data), False)}
    private = asked.get("visibility", "private" if asked.get("private") else "public")
    try:
        hub.repos.create(kind, name, private, first)
    except HubError as error:
        if error.status != 409:
            raise
        return JSONResponse({"error": error.message, "url": url}, 409)
    return JSONResponse({"url": url, "name": name, "id": name})


async def delete(request: Request) -> Response:
    asked, caller = await request.json(), needs_user(request)
    owner, kind = asked.get("organization") or caller.name, f"{asked.get('type') or 'model'}s"
    allowed(caller, owner, kind)
    server(request).repos.delete(kind, f"{owner}/{asked['name']}")
    return Response()


async def settings(request: Request) -> Response:
    found, asked = repo(request, write=True), await request.json()
    known = {key: asked[key] for key in ("visibility", "gated") if key in asked}
    if "private" in asked:
        known["visibility"] = "private" if asked["private"] else "public"
    found.state |= known
    found.save()
    return JSONResponse(known)


async def auth_check(request: Request) -> Response:
    repo(request, write=request.url.path.endswith("/write"))
    return JSONResponse({})


async def refs(request: Request) -> Response:
    found = repo(request)

    def below(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in sorted(found.refs.items())
            if ref.startswith(prefix)
        ]

    body: dict[str, Any] = {"branches": below(HEADS), "tags": below(TAGS), "converts": []}
    if "include_prs" in request.query_params:
        body["pullRequests"] = below(PULLS)
    return JSONResponse(body)


def _new(found: Repo, ref: str, prefix: str, at: str) -> Response:
    if REF.fullmatch(ref) is None:
        raise HubError(400, f"Invalid reference name: {ref}")
    if prefix + ref in found.refs:
        raise HubError(409, f"Reference already exists: {prefix}{ref}")
    found.move(prefix + ref, found.resolve(at)[1])
    return JSONResponse({"success": True})


async def create_branch(request: Request) -> Response:
    asked = await request.json()
    start = asked.get("startingPoint", "main")
    return _new(repo(request, write=True), param(request, "ref"), HEADS, start)


async def create_tag(request: Request) -> Response:
    asked = await request.json()
    return _new(repo(request, write=True), asked["tag"], TAGS, param(request, "ref"))


def _drop(request: Request, prefix: str) -> Response:
    found, ref = repo(request, write=True), prefix + param(request, "ref")
    if ref == f"{HEADS}main":
        raise HubError(403, "Cannot delete the main branch")
    if ref not in found.refs:
        raise no_revision(ref.removeprefix(prefix))
    found.move(ref, None)
    return Response()


async def delete_branch(request: Request) -> Response:
    return _drop(request, HEADS)


async def delete_tag(request: Request) -> Response:
    return _drop(request, TAGS)


async def squash(request: Request) -> Response:
    asked, found = await request.json(), repo(request, write=True)
    branch = HEADS + param(request, "ref")
    if branch not in found.refs:
        raise no_revision(param(request, "ref"))
    head = found.commit(found.refs[branch])
    found.move(branch, found.add(head.files, None, asked["message"], "", head.author))
    return JSONResponse({"success": True})


def _lfs_files(found: Repo) -> dict[str, dict[str, Any]]:
    """Every LFS file of every commit that a ref reaches, by SHA-256."""
    listed: dict[str, dict[str, Any]] = {}
    for ref in found.refs:
        for commit in found.history(ref):
            for path, file in commit.files.items():
                if file.lfs:
                    shown = {"fileOid": file.sha256, "oid": file.sha256, "size": file.size}
                    shown |= {"filename": path, "pushedAt": commit.date, "ref": ref}
                    listed.setdefault(file.sha256, shown)
    return listed


async def lfs_files(request: Request) -> Response:
    return paged(request, list(_lfs_files(repo(request)).values()))


async def delete_lfs_files(request: Request) -> Response:
    """Drops contents for ever; with rewriteHistory also the files of every commit that had them."""
    asked, found = (await request.json())["deletions"], repo(request, write=True)
    gone = set(asked["sha"]) & _lfs_files(found).keys()
    if asked.get("rewriteHistory"):
        rewritten: dict[str, str] = {}
        for ref in found.refs:
            for old in reversed(found.history(ref)):
                if old.oid not in rewritten:
                    files = {p: f for p, f in old.files.items() if f.sha256 not in gone}
                    parent = rewritten[old.parent] if old.parent else None
                    new = found.add(files, parent, old.title, old.message, old.author, old.date)
                    rewritten[old.oid] = new
        found.state["refs"] = {ref: rewritten[oid] for ref, oid in found.refs.items()}
        found.save()
    for sha256 in gone:
        server(request).store.forget(sha256)
    return JSONResponse({"success": True})


async def xet_token(request: Request) -> Response:
    """Where the Xet store is, in the body for hf_xet and in headers for huggingface_hub."""
    write = "write" in request.url.path
    found = repo(request, write=write and "create_pr" not in request.query_params)
    if param(request, "revision") != "None":
        found.resolve(param(request, "revision"))
    hub, expires = server(request), int(time.time()) + TOKEN_SECONDS
    url = hub.store.xet.url if hub.xet == "local" else f"{request.base_url}cas"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": cas.TOKEN}
    headers["X-Xet-Token-Expiration"] = str(expires)
    body = {"casUrl": url, "accessToken": cas.TOKEN, "exp": expires}
    return JSONResponse(body, headers=headers)
