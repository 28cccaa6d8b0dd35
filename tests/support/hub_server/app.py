"""The routes, and the process: uvicorn on 127.0.0.1."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from . import access, cards, cas, commits, errors, faults, lfs, manage, reading
from .repos import Repos
from .store import Store

REPO = "/{kind}/{owner}/{name}"


def routes() -> list[Route]:
    api, get, post = f"/api{REPO}", ["GET"], ["POST"]
    found = [
        Route("/reread", manage.reread, methods=post),
        Route("/api/whoami-v2", manage.who),
        Route("/api/validate-yaml", cards.validate, methods=post),
        Route("/api/repos/create", manage.create, methods=post),
        Route("/api/repos/delete", manage.delete, methods=["DELETE"]),
        Route(api, reading.info),
        Route(f"{api}/revision/{{revision}}", reading.info),
        Route(f"{api}/tree/{{revision}}", reading.tree),
        Route(f"{api}/tree/{{revision}}/{{path:path}}", reading.tree),
        Route(f"{api}/paths-info/{{revision}}", reading.paths_info, methods=post),
        Route(f"{api}/commits/{{revision}}", reading.commits),
        Route(f"{api}/preupload/{{revision}}", commits.preupload, methods=post),
        Route(f"{api}/commit/{{revision}}", commits.commit, methods=post),
        Route(f"{api}/refs", manage.refs),
        Route(f"{api}/branch/{{ref}}", manage.create_branch, methods=post),
        Route(f"{api}/branch/{{ref}}", manage.delete_branch, methods=["DELETE"]),
        Route(f"{api}/tag/{{ref}}", manage.create_tag, methods=post),
        Route(f"{api}/tag/{{ref}}", manage.delete_tag, methods=["DELETE"]),
        Route(f"{api}/super-squash/{{ref}}", manage.squash, methods=post),
        Route(f"{api}/settings", manage.settings, methods=["PUT"]),
        Route(f"{api}/auth-check", manage.auth_check),
        Route(f"{api}/auth-check/write", manage.auth_check),
        Route(f"{api}/lfs-files", manage.lfs_files),
        Route(f"{api}/lfs-files/batch", manage.delete_lfs_files, methods=post),
        Route(f"{api}/xet-write-token/{{revision}}", manage.xet_token),
        Route(f"{api}/xet-read-token/{{revision}}", manage.xet_token),
        Route("/storage/{upload}", lfs.put, methods=["PUT"]),
        Route("/storage/{upload}/{number:int}", lfs.put, methods=["PUT"]),
        Route("/complete/{upload}", lfs.complete, methods=post),
        Route("/cdn/{sha256}", reading.cdn),
        Route("/cas/v1/xorbs/default/{hash}", cas.put_xorb, methods=post),
        Route("/cas/v1/chunks/default/{hash}", cas.known_chunk),
        Route("/cas/v1/shards", cas.put_shard, methods=post),
        Route("/cas/v1/reconstructions/{hash}", cas.reconstruction),
        Route("/cas/xorbs/{hash}", cas.get_xorb),
    ]
    for prefix in ("/{owner}/{name}", REPO):
        objects = f"{prefix}/info/lfs/objects"
        found.append(Route(f"{objects}/batch", lfs.batch, methods=post))
        found.append(Route(f"{objects}/verify", lfs.verify, methods=post))
        found.append(
            Route(f"{prefix}/resolve/{{revision}}/{{path:path}}", reading.resolve, methods=get)
        )
    return found


class Protocol(HttpToolsProtocol):
    """Gives the layer of faults the connection, which ASGI hides."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[faults.TRANSPORT] = self.transport  # type: ignore[literal-required]


def serve(folder: Path, port: int, **options: Any) -> None:
    """Serves until the process ends; says its address in one line on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    orgs = tuple(options.pop("orgs").split(","))
    users = {
        access.TOKEN: access.User("tester", orgs, "write"),
        access.READ_TOKEN: access.User("reader", orgs, "read"),
    }
    store = Store(folder, options.pop("check_xet"))
    for part in store.parts.iterdir():  # uploads that an earlier server granted
        part.unlink()
    app = Starlette(routes=routes(), exception_handlers={errors.HubError: errors.answer})
    app.state.server = access.Server(Repos(folder), store, users, **options)
    listening = socket.create_server(("127.0.0.1", port))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        faults.Faults(app, folder / "journal.jsonl"),
        http=Protocol,
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        timeout_keep_alive=120,  # seconds; the client holds connections open
        timeout_graceful_shutdown=1,
    )
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:
        sys.exit(130)
