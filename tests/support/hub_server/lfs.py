"""Git LFS uploads: the batch answer, one PUT or many, completion, verify.

Batch: github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. The transfer "multipart", with the
parts' addresses in ``header``, is the Hub's own (huggingface_hub/lfs.py). An ETag is made of the
SHA-256 of what was received; S3 takes the MD5, which no client may rely on and which is slower.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .access import Server, param, repo, server
from .errors import HubError
from .store import Store, sha256_of, write_whole

BATCH_LIMIT = 256  # objects
SHA256 = re.compile("[0-9a-f]{64}")


def storage(request: Request) -> str:
    """The address of the storage and CDN: the same server by another host name."""
    return f"http://localhost:{request.url.port}"


async def batch(request: Request) -> Response:
    repo(request, write=True)
    asked = await request.json()
    objects = asked["objects"]
    if asked["operation"] != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "expected an upload with sha256")
    if len(objects) > BATCH_LIMIT:
        raise HubError(413, f"{len(objects)} objects in a batch: at most {BATCH_LIMIT}")
    hub = server(request)
    parts = any(_in_parts(hub, o["size"]) for o in objects) and "multipart" in asked["transfers"]
    answers = [_object(request, hub, o["oid"], o["size"]) for o in objects]
    body = {"transfer": "multipart" if parts else "basic", "objects": answers}
    return JSONResponse(body, media_type="application/vnd.git-lfs+json")


def _in_parts(hub: Server, size: int) -> bool:
    return size > hub.multipart_over


def _object(request: Request, hub: Server, oid: str, size: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if SHA256.fullmatch(oid) is None or size <= 0:
        return answer | {"error": {"code": 422, "message": f"invalid object {oid} of {size} bytes"}}
    if (held := hub.store.size(oid)) is not None:
        if held != size:
            message = f"{oid} has {held} bytes, not {size}"
            return answer | {"error": {"code": 422, "message": message}}
        return answer
    upload = uuid4().hex
    write_whole(hub.store.parts / f"{upload}.json", json.dumps({"oid": oid, "size": size}).encode())
    address = f"{storage(request)}/storage/{upload}"
    verify = {"href": f"{request.base_url}{request.url.path[1:].removesuffix('/batch')}/verify"}
    if not _in_parts(hub, size):
        return answer | {"actions": {"upload": {"href": address}, "verify": verify}}
    count = -(-size // hub.part_size)
    header = {"chunk_size": str(hub.part_size)}
    header |= {str(number): f"{address}/{number}" for number in range(1, count + 1)}
    completion = f"{request.base_url}complete/{upload}"
    return answer | {
        "actions": {"upload": {"href": completion, "header": header}, "verify": verify}
    }


def _upload(store: Store, request: Request) -> dict[str, Any]:
    path = store.parts / f"{param(request, 'upload')}.json"
    if not path.is_file():
        raise HubError(404, "NoSuchUpload")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


async def put(request: Request) -> Response:
    """A whole file, or part N: received into its place; the digest is the answer's ETag."""
    hub = server(request)
    store, upload = hub.store, param(request, "upload")
    wanted = _upload(store, request)
    number = int(request.path_params.get("number", 0))
    start = max(number - 1, 0) * hub.part_size
    size = min(hub.part_size, wanted["size"] - start) if number else wanted["size"]
    part = store.parts / upload
    part.touch()
    sha256, received = hashlib.sha256(), 0
    with part.open("r+b") as data:
        data.seek(start)
        try:
            async for piece in request.stream():
                received += len(piece)
                if received > size:
                    raise HubError(400, f"EntityTooLarge: more than {size} bytes")
                data.write(piece)
                sha256.update(piece)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it
    if received != size:
        raise HubError(400, f"IncompleteBody: {received} of {size} bytes")
    etag = f'"{sha256.hexdigest()[:32]}"'
    if number:
        write_whole(store.parts / f"{upload}.{number}", etag.encode())
    elif sha256.hexdigest() != wanted["oid"]:
        raise HubError(400, "BadDigest: the content does not have the SHA-256 announced for it")
    else:
        _finish(store, upload, wanted["oid"])
    return Response(headers={"ETag": etag})


async def complete(request: Request) -> Response:
    """All parts are there: their ETags and the SHA-256 of the whole must be right."""
    hub = server(request)
    store, upload = hub.store, param(request, "upload")
    wanted, path, asked = _upload(store, request), store.parts / upload, await request.json()
    if not path.is_file() and store.size(wanted["oid"]) is not None:
        return JSONResponse({})  # asked a second time
    count = -(-wanted["size"] // hub.part_size)
    given = {part["partNumber"]: part["etag"] for part in asked["parts"]}
    if asked["oid"] != wanted["oid"] or sorted(given) != list(range(1, count + 1)):
        raise HubError(400, f"InvalidPart: expected parts 1 to {count} of {wanted['oid']}")
    for number, etag in given.items():
        received = path.with_name(f"{upload}.{number}")
        if not received.is_file() or received.read_text() != etag:
            raise HubError(400, f"InvalidPart: part {number} is not there with ETag {etag}")
    with path.open("rb") as data:
        sha256 = await asyncio.to_thread(sha256_of, iter(lambda: data.read(1 << 20), b""))
    if sha256 != wanted["oid"]:
        raise HubError(400, "BadDigest: the content does not have the SHA-256 announced for it")
    _finish(store, upload, sha256)
    return JSONResponse({})


def _finish(store: Store, upload: str, sha256: str) -> None:
    """What was granted stays: a client that did not hear the answer sends the request again."""
    store.keep(store.parts / upload, sha256)
    for part in store.parts.glob(f"{upload}.[0-9]*"):
        part.unlink()


async def verify(request: Request) -> Response:
    repo(request, write=True)
    asked = await request.json()
    held = server(request).store.size(asked["oid"])
    if held != asked["size"]:
        raise HubError(
            404, f"{asked['oid']}: {asked['size']} bytes expected, {held or 'none'} here"
        )
    return JSONResponse({"success": True})
