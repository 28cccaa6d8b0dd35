"""The Xet CAS over HTTP, as hf_xet 1.8 asks it: xorbs and shards in, reconstructions and xorbs out.

What hf_xet tries first and does without on a 404 is left out: upload grants (/v1/xorb-grants),
/v2/shards, /v2/reconstructions. A xorb's hash is not computed here (it is BLAKE3 over a tree of
chunks): a commit reads the whole file and checks its SHA-256 instead.
"""

from __future__ import annotations

import re
from hashlib import sha1
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from .access import server
from .errors import HubError
from .store import write_whole
from .xet import HEAD, XetStore, chunks_of, files_of, raw, with_footer

TOKEN = "xet"  # what the Hub's tokens for this server say
HASH = re.compile("[0-9a-f]{64}")


def _store(request: Request) -> XetStore:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        raise HubError(401, "expected the access token of xet-read-token or xet-write-token")
    return server(request).store.xet


def _hash(request: Request) -> str:
    found: str = request.path_params["hash"]
    if HASH.fullmatch(found) is None:
        raise HubError(400, f"not a hash: {found}")
    return found


async def known_chunk(request: Request) -> Response:
    """A shard that has the chunk: what is here already, the client does not send again."""
    store, wanted = _store(request), raw(_hash(request))
    for shard in store.shards.glob("*.mdb"):
        if wanted in (data := shard.read_bytes()):
            return Response(with_footer(data), media_type="application/octet-stream")
    raise HubError(404, "no such chunk")


async def put_xorb(request: Request) -> Response:
    """Chunks, streamed to disk; whole if their headers add up to the body's length."""
    store = _store(request)
    xorb = store.xorb(_hash(request))
    xorb.parent.mkdir(parents=True, exist_ok=True)
    part = xorb.with_name(f".{uuid4().hex}.part")
    try:
        with part.open("wb") as data:
            async for piece in request.stream():
                data.write(piece)
        chunks = chunks_of(part)
        if not chunks or chunks[-1].at + HEAD + chunks[-1].packed != part.stat().st_size:
            raise HubError(400, "a xorb's chunks do not end where its body does")
        new = not xorb.exists()
        part.replace(xorb)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody hears it
    finally:
        part.unlink(missing_ok=True)
    return JSONResponse({"was_inserted": new})


async def put_shard(request: Request) -> Response:
    """Taken if every chunk of its files is here."""
    store, shard = _store(request), await request.body()
    for file in files_of(shard):
        for segment in file.segments:
            xorb = store.xorb(segment.xorb)
            chunks = chunks_of(xorb)[segment.first : segment.end] if xorb.exists() else ()
            if sum(chunk.size for chunk in chunks) != segment.size:
                raise HubError(400, f"a shard names chunks that are not here: {segment}")
    name = store.shards / f"{sha1(shard).hexdigest()}.mdb"
    new = not name.exists()
    write_whole(name, shard)
    return JSONResponse({"result": int(new)})


async def reconstruction(request: Request) -> Response:
    """Which chunks of which xorbs, in order, hold the range asked for; and where to get them."""
    store, wanted = _store(request), request.headers.get("range", "bytes=0-")
    file = store.find(_hash(request))
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if file is None or asked is None:
        raise HubError(404, "no such file")
    start, end = int(asked[1]), min(int(asked[2] or file.size) + 1, file.size)
    if start >= end:
        raise HubError(416, "Requested range not satisfiable")
    spans = list(store.spans(file, start, end))
    terms, places = [], dict[str, list[object]]()
    for span in spans:
        chunks = {"start": span.first, "end": span.first + len(span.chunks)}
        terms.append({"hash": span.xorb, "unpacked_length": span.size, "range": chunks})
        last = span.chunks[-1]
        packed = {"start": span.chunks[0].at, "end": last.at + HEAD + last.packed - 1}
        url = f"{request.base_url}cas/xorbs/{span.xorb}"
        places.setdefault(span.xorb, []).append({"range": chunks, "url": url, "url_range": packed})
    first = start - spans[0].at if spans else 0
    body = {"offset_into_first_range": first, "terms": terms, "fetch_info": places}
    return JSONResponse(body)


async def get_xorb(request: Request) -> Response:
    """A xorb by an address that the reconstruction gave: no token."""
    xorb = server(request).store.xet.xorb(_hash(request))
    if not xorb.exists():
        raise HubError(404, "no such xorb")
    return FileResponse(xorb)
