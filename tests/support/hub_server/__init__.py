"""A local Hub for tests: what the unmodified huggingface_hub 2.4 and hf_xet 1.8 need.

``with hub(folder) as server:`` runs it in a process of its own, on loopback. What it holds lies in
``folder`` and is there again after a restart: ``repos/`` (repositories), ``blobs/`` (contents by
SHA-256), ``cas/`` (the Xet store; with ``xet="local"`` hf_xet writes it itself),
``parts/`` (unfinished uploads), ``journal.jsonl`` and ``server.log``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .access import READ_TOKEN, TOKEN
from .repos import HEADS, Commit, Repo, Repos
from .store import Store, sha256_of

__all__ = ["READ_TOKEN", "TOKEN", "Hub", "hub"]


class Hub:
    """A running server, seen from the test: its address, journal, faults and what it holds."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.endpoint, self.folder = endpoint, folder

    def env(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a client process, which reads it when it imports huggingface_hub."""
        home = self.folder.parent / f"{self.folder.name}-client"
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING"))}
        for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_DIR"):
            kept.pop(name, None)
            kept.pop(name.lower(), None)
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms",  # 3 s else; how often stays as it is
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            # One certificate, as http needs none: each client would read all of the system's.
            "SSL_CERT_FILE": str(Path(__file__).with_name("certificate.pem")),
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def journal(self) -> list[dict[str, Any]]:
        """Every request so far, as it ended: method, path, query, status (None: no answer),
        bytes_in, bytes_out, when, seconds, fault.
        """
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return []

        # A line follows its answer, so that the last one may be on its way when a client ends.
        data = path.read_bytes()
        while True:
            time.sleep(0.02)
            later_data = path.read_bytes()
            if len(later_data) == len(data):
                return [json.loads(line) for line in data.splitlines()]
            data = later_data

    def fault(self, kind: str, *, path: str = "", **more: Any) -> None:
        """Sets a fault, from now on; what ``kind`` and ``more`` may be: faults.py."""
        self._control("POST", {"kind": kind, "path": path, **more})

    def no_faults(self) -> None:
        self._control("DELETE")

    def files(
        self, repo: str, revision: str = "main", kind: str = "models"
    ) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of a revision's files, from the bytes themselves, read for this call."""
        store, found = Store(self.folder), {}
        for path, entry in self._repo(repo, kind).at(revision).files.items():
            size = 0

            def counted(sha256: str = entry.sha256) -> Iterator[bytes]:
                nonlocal size
                for piece in store.read(sha256):
                    size += len(piece)
                    yield piece

            sha256 = sha256_of(counted())
            assert (size, sha256) == (entry.size, entry.sha256), (
                f"the server's copy of {path} is damaged"
            )
            found[path] = (size, sha256)
        return found

    def read(self, repo: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        entry = self._repo(repo, kind).at(revision).files[path]
        return b"".join(Store(self.folder).read(entry.sha256))

    def commits(self, repo: str, revision: str = "main", kind: str = "models") -> list[Commit]:
        """Newest first."""
        return self._repo(repo, kind).history(revision)

    def branches(self, repo: str, kind: str = "models") -> dict[str, str]:
        """The branches and the commits they point at."""
        refs = self._repo(repo, kind).refs.items()
        return {ref.removeprefix(HEADS): oid for ref, oid in refs if ref.startswith(HEADS)}

    def repo(self, repo: str, kind: str = "models") -> dict[str, Any]:
        """What the server knows of a repository: visibility, refs ..."""
        return self._repo(repo, kind).state

    def _repo(self, repo: str, kind: str) -> Repo:
        return Repos(self.folder).get(kind, repo)

    def empty(self) -> None:
        """Forgets all repositories, all contents and all requests."""
        shutil.rmtree(self.folder / "repos", ignore_errors=True)
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        for name in ("blobs", "cas", "parts"):
            for path in (self.folder / name).rglob("*"):
                if not path.is_dir():
                    path.unlink()
        self.reread()

    def reread(self) -> None:
        """Has the server forget what it has read of the folder, because it was changed."""
        self._control("POST", path="reread")

    def _control(
        self, method: str, body: dict[str, Any] | None = None, path: str = "faults"
    ) -> None:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self.endpoint}/{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10):
            pass


@contextmanager
def hub(folder: Path, **options: Any) -> Iterator[Hub]:
    """Runs the server on a free port. ``options`` are those of ``python -m tests.hub_server``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __name__, str(folder), "--owned"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    # The folder that holds the package, by whatever name it was imported.
    root = Path(__file__).parents[__name__.count(".") + 1]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        if not endpoint:
            raise RuntimeError(f"the test Hub did not start: {(folder / 'server.log').read_text()}")
        yield Hub(endpoint, folder)
    finally:
        process.terminate()
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
