"""Faults on the wire, and the journal: an ASGI layer around the whole server.

A fault applies to requests whose method and path match; ``kind``:

==========  ==============================================================================
status      answers ``status`` (412, 429 with ``retry_after``, 500 ...), the body read
quota       answers 403 with the sentence the Hub has for a full storage
reset       drops the connection (RST) once ``after`` bytes of the body have come; 0: at once
lost        does the work, then drops the connection instead of answering
truncate    ends the connection (FIN) once ``after`` bytes of the answer's body are out
slow        lets ``rate`` bytes a second through, both ways
etag        answers with another ETag than the right one
==========  ==============================================================================

``skip`` matching requests pass first (``after`` means that too where no bytes are counted), then
``times`` requests are hit (None: all of them).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import QUOTA, HubError

KINDS = ("status", "quota", "reset", "lost", "truncate", "slow", "etag")
TRANSPORT = "hub.transport"  # of the scope: the connection


@dataclass(slots=True)
class Fault:
    kind: str
    path: str = ""
    method: str = ""
    after: int = 0
    skip: int = 0
    times: int | None = 1
    status: int = 500
    retry_after: int | None = None
    rate: int = 1 << 20  # bytes a second
    message: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.kind}: expected one of {', '.join(KINDS)}")
        if self.kind not in ("reset", "truncate"):
            self.skip, self.after = self.skip + self.after, 0

    def takes(self, scope: Scope) -> bool:
        """Whether this request is hit; counts it."""
        path = scope["raw_path"].decode()
        if not re.search(self.path, path) or self.method not in ("", scope["method"]):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def answer(self) -> HubError:
        if self.kind == "quota":
            return HubError(403, self.message or QUOTA)
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return HubError(self.status, self.message or f"injected {self.status}", headers=headers)


class Dropped(Exception):
    """The connection was dropped on purpose."""


async def drop(scope: Scope) -> None:
    """Resets the connection (RST): the client cannot take it for a proper end."""
    transport = scope[TRANSPORT]
    peer = transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    await asyncio.sleep(0)  # uvicorn hears of it
    raise Dropped


async def close(scope: Scope) -> None:
    """Ends the connection (FIN) when what was sent is out."""
    scope[TRANSPORT].close()
    await asyncio.sleep(0)
    raise Dropped


class Faults:
    """The layer. ``/faults`` sets one (POST) or forgets all (DELETE)."""

    def __init__(self, app: ASGIApp, journal: Path) -> None:
        self.app, self.journal, self.set = app, journal, list[Fault]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] == "/faults":
            return await self._control(scope, receive, send)
        scope["path"] = scope["raw_path"].decode()  # routes match the quoted path
        line: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": None}
        line |= {"query": scope["query_string"].decode(), "when": time.time()}
        line |= {"bytes_in": 0, "bytes_out": 0, "fault": None}
        fault = next((f for f in self.set if f.times != 0 and f.takes(scope)), None)
        if fault is not None:
            line["fault"] = fault.kind
        try:
            await self._serve(fault, line, scope, receive, send)
        except Dropped:
            if fault is not None and fault.kind != "truncate":
                line["status"] = None
        finally:
            line["seconds"] = round(time.time() - line["when"], 4)
            with self.journal.open("a") as journal:
                journal.write(json.dumps(line) + "\n")
        return None

    async def _serve(
        self, fault: Fault | None, line: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        kind = None if fault is None else fault.kind

        async def heard() -> Message:
            message = await receive()
            size = len(message.get("body", b""))
            line["bytes_in"] += size
            if fault is not None and kind == "slow":
                await asyncio.sleep(size / fault.rate)
            if fault is not None and kind == "reset" and line["bytes_in"] >= fault.after:
                await drop(scope)
            return message

        async def said(message: Message) -> None:
            if kind == "lost":
                await drop(scope)
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                if kind == "etag":
                    headers = [h for h in message["headers"] if h[0].lower() != b"etag"]
                    message["headers"] = [*headers, (b"etag", b'"%032d"' % 0)]
            else:
                body = message.get("body", b"")
                if fault is not None and kind == "slow":
                    await asyncio.sleep(len(body) / fault.rate)
                if fault is not None and kind == "truncate":
                    left = fault.after - line["bytes_out"]
                    if len(body) >= left:
                        await send({**message, "body": body[: max(left, 0)], "more_body": True})
                        line["bytes_out"] += max(left, 0)
                        await close(scope)
                line["bytes_out"] += len(body)
            await send(message)

        if fault is not None and kind == "reset" and fault.after == 0:
            await drop(scope)
        if fault is not None and kind in ("status", "quota"):
            while (await heard()).get("more_body"):
                pass
            await fault.answer().response()(scope, receive, said)
            return
        await self.app(scope, heard, said)

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        if scope["method"] == "POST":
            self.set.append(Fault(**json.loads(body)))
        else:
            self.set.clear()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
