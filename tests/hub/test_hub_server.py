"""The test Hub against its judges: the unmodified huggingface_hub and hf_xet, as processes."""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from hub_server import READ_TOKEN, Hub, hub
from hub_server.client import LFS, XET, Client, client

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(
        tmp_path_factory.mktemp("hub") / "hub", multipart_over=2 * MIB, part_size=MIB
    ) as started:
        yield started


@pytest.fixture
def server(shared: Hub) -> Iterator[Hub]:
    """One server for the module, without faults; each test has its own repository and contents."""
    yield shared
    shared.no_faults()


@pytest.fixture(scope="module")
def lfs(shared: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(shared, tmp_path_factory.mktemp("lfs"), **LFS) as started:
        yield started


@pytest.fixture(scope="module")
def xet(shared: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(shared, tmp_path_factory.mktemp("xet"), **XET) as started:
        yield started


@pytest.fixture
def news(server: Hub) -> Callable[[], list[dict[str, Any]]]:
    """The requests since the test began."""
    before = len(server.journal())
    return lambda: server.journal()[before:]


@pytest.fixture
def repo() -> str:
    return f"org/{uuid4().hex}"


@pytest.fixture
def model(tmp_path: Path, repo: str) -> Path:
    """A folder as a push would send it: small and large, text and binary, one file in parts."""
    folder = tmp_path / "model"
    folder.mkdir()
    random = Random(repo)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "curve.png").write_bytes(b"\x89PNG\r\n" + random.randbytes(3000))
    (folder / "model-1.safetensors").write_bytes(random.randbytes(5 * MIB // 2))
    (folder / "model-2.safetensors").write_bytes(random.randbytes(4) * 50_000)
    (folder / "code").mkdir()
    (folder / "code/modeling tiny.py").write_text("x = 1\n")
    return folder


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }


TRANSPORTS = pytest.mark.parametrize("transport", ["lfs", "xet"])
News = Callable[[], list[dict[str, Any]]]


@TRANSPORTS
def test_a_folder_pushed_and_pulled_is_the_same_bytes(
    server: Hub,
    model: Path,
    repo: str,
    tmp_path: Path,
    news: News,
    transport: str,
    request: pytest.FixtureRequest,
) -> None:
    ask: Client = request.getfixturevalue(transport)
    pushed = ask("push", model=model, repo=repo)
    assert pushed["url"] == f"{server.endpoint}/{repo}/commit/{pushed['oid']}"
    held = server.files(repo)
    assert held.pop(".gitattributes")
    assert held == digests(model)
    assert [c.title for c in server.commits(repo)] == ["a model", "initial commit"]
    assert server.repo(repo)["visibility"] == "private"
    pulled = ask("pull", repo=repo, folder=tmp_path / "pulled")
    assert pulled == {"checked": 7, "wrong": []}
    (tmp_path / "pulled/.gitattributes").unlink()
    assert digests(tmp_path / "pulled") == digests(model)
    paths = [line["path"] for line in news()]
    parts = [path for path in paths if re.fullmatch(r"/storage/\w+/\d+", path)]
    assert len(parts) == (3 if transport == "lfs" else 0)
    for path in ("xet-write-token", "xet-read-token", "/cas/v1/xorbs/", "/cas/xorbs/"):
        assert any(path in seen for seen in paths) == (transport == "xet")


def test_what_xet_stored_is_served_over_http_too(
    server: Hub, lfs: Client, xet: Client, model: Path, repo: str, tmp_path: Path
) -> None:
    """The reader of the Xet store here is not hf_xet: each is the other's judge."""
    xet("push", model=model, repo=repo)
    assert lfs("pull", repo=repo, folder=tmp_path / "pulled")["wrong"] == []
    url = f"http://localhost:{server.endpoint.rsplit(':')[-1]}/cdn/"
    whole = (model / "model-1.safetensors").read_bytes()
    for start, end in ((0, 8), (65_530, 200_000), (len(whole) - 5, len(whole))):
        request = urllib.request.Request(url + hashlib.sha256(whole).hexdigest())
        request.add_header("Range", f"bytes={start}-{end - 1}")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206
            assert answer.read() == whole[start:end]


def test_hf_xet_may_write_the_store_itself_and_a_restart_changes_nothing(
    model: Path, repo: str, tmp_path: Path
) -> None:
    with hub(tmp_path / "hub", xet="local") as server, client(server, tmp_path, **XET) as ask:
        ask("push", model=model, repo=repo)
        assert not any(line["path"].startswith("/cas") for line in server.journal())
        before = server.files(repo)
    with hub(tmp_path / "hub") as server, client(server, tmp_path, **XET) as ask:
        assert server.files(repo) == before
        pulled = ask("pull", repo=repo, folder=tmp_path / "pulled")
        assert pulled == {"checked": 7, "wrong": []}


@TRANSPORTS
def test_a_second_push_sends_nothing_and_makes_no_commit(
    server: Hub,
    model: Path,
    repo: str,
    news: News,
    transport: str,
    request: pytest.FixtureRequest,
) -> None:
    ask: Client = request.getfixturevalue(transport)
    first, before = ask("push", model=model, repo=repo), len(news())
    again = ask("push", model=model, repo=repo)
    assert again["oid"] == first["oid"]
    assert len(server.commits(repo)) == 2
    later = [f"{line['method']} {line['path']}" for line in news()[before:]]
    assert not any("PUT" in line or "/commit/" in line or "/xorbs/" in line for line in later)


def test_chunks_that_another_client_sent_are_not_sent_again(
    server: Hub, xet: Client, model: Path, repo: str, news: News, tmp_path: Path
) -> None:
    big = model / "model-1.safetensors"
    big.write_bytes(Random(repo).randbytes(12 * MIB))
    xet("push", model=model, repo=repo)
    changed = bytearray(big.read_bytes())
    changed[6 * MIB : 6 * MIB + 8] = bytes(8)
    big.write_bytes(changed)
    before, fresh = len(news()), str(tmp_path / "fresh")
    with client(server, tmp_path, **XET, HF_XET_CACHE=fresh) as ask:
        ask("push", model=model, repo=repo)
    sent = [line["bytes_in"] for line in news()[before:] if "/cas/v1/xorbs/" in line["path"]]
    assert 0 < sum(sent) < MIB
    assert server.files(repo).items() > digests(model).items()


def test_a_moved_head_is_412_and_changes_nothing(
    server: Hub, lfs: Client, model: Path, repo: str
) -> None:
    start = lfs("push", model=model, repo=repo)
    (model / "config.json").write_text("{}")
    moved = lfs("push", model=model, repo=repo)
    (model / "config.json").write_text('{"a": 1}')
    late = lfs("push", model=model, repo=repo, parent_commit=start["oid"])
    assert (late["error"], late["status"]) == ("HfHubHTTPError", 412)
    assert server.branches(repo) == {"main": moved["oid"]}


def test_a_pull_request_leaves_the_branch_alone(
    server: Hub, xet: Client, model: Path, repo: str
) -> None:
    pushed = xet("push", model=model, repo=repo, create_pr=True)
    assert pushed["pr"] == "refs/pr/1"
    assert list(server.files(repo)) == [".gitattributes"]
    assert server.files(repo, "refs/pr/1").items() > digests(model).items()


def test_branches_tags_history_and_deletions(tmp_path: Path, model: Path, repo: str) -> None:
    with (
        hub(tmp_path / "hub", page=2) as server,  # every list comes in pages
        client(server, tmp_path, **LFS) as ask,
    ):
        ask("push", model=model, repo=repo)
        found = ask("upkeep", repo=repo)
    kept = ["README.md", "copy", "curve.png", "model-1", "model-2"]
    files = [name if "." in name else f"{name}.safetensors" for name in kept]
    assert found["files"] == [".gitattributes", *files, "new/.gitignore"]
    assert "code" in found["top"] and "code/modeling tiny.py" not in found["top"]
    assert found["info"] == ["code", "README.md"]
    assert found["last"]["README.md"] == "a model" and found["last"]["new"] == "tidy"
    assert found["titles"] == ["tidy", "a model", "initial commit"]
    assert found["errors"] == {
        "branch": "RevisionNotFoundError",
        "folder": "RemoteEntryNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "delete": "RemoteEntryNotFoundError",
        "main": "403",
        "twice": "409",
        "name": "400",
    }
    assert found["branches"] == ["main", "step-5"]
    assert found["tags"] == {"v1": True}
    assert found["squashed"] == 1
    assert "model-1.safetensors" not in found["left"] and "model-2.safetensors" in found["left"]


def test_tokens_decide_who_sees_and_who_writes(lfs: Client, model: Path, repo: str) -> None:
    oid = lfs("push", model=model, repo=repo)["oid"]
    assert lfs("push", model=model, repo="elsewhere/tiny")["status"] == 403
    assert lfs("look", repo="org/none") == "RepositoryNotFoundError 404"
    assert lfs("look", repo=repo, token=READ_TOKEN) == oid
    assert lfs("push", model=model, repo=repo, token=READ_TOKEN)["status"] == 403
    assert lfs("look", repo=repo, token="hf_wrong") == "HfHubHTTPError 401"
    assert lfs("look", repo=repo, token=False) == "RepositoryNotFoundError 401"


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("license: [", "invalid yaml"),
        ("base_model: {a: 1}", '"base_model" must be a string'),
        ("model-index:\n- name: m\n  results:\n  - metrics: []", '.task" is required'),
    ],
)
def test_a_bad_card_is_refused_before_anything_is_sent(
    server: Hub, lfs: Client, model: Path, repo: str, card: str, says: str
) -> None:
    (model / "README.md").write_text(f"---\n{card}\n---\n")
    refused = lfs("push", model=model, repo=repo)
    assert refused["error"] == "ValueError" and says in refused["says"]
    assert list(server.files(repo)) == [".gitattributes"]


def test_files_that_gitignore_names_are_left_out(
    server: Hub, lfs: Client, model: Path, repo: str
) -> None:
    (model / ".gitignore").write_text("*.png\ncode/\n")
    lfs("push", model=model, repo=repo)
    assert digests(model).keys() - server.files(repo).keys() == {
        "curve.png",
        "code/modeling tiny.py",
    }


PART, XORB = r"/storage/\w+/\d", "/cas/v1/xorbs/"


@pytest.mark.parametrize(
    ("transport", "kind", "more"),
    [
        ("lfs", "status", {"path": "/preupload/", "status": 429, "retry_after": 1}),
        ("lfs", "status", {"path": "/storage/", "status": 500, "after": 1}),
        ("lfs", "reset", {"path": PART, "after": MIB // 2, "skip": 1}),
        ("lfs", "reset", {"path": "/objects/batch"}),
        ("lfs", "lost", {"path": "/complete/"}),
        ("lfs", "lost", {"path": r"/storage/\w+$"}),
        ("xet", "status", {"path": XORB, "status": 429, "retry_after": 1}),
        ("xet", "status", {"path": "/cas/v1/shards", "status": 500}),
        ("xet", "reset", {"path": XORB, "after": MIB // 2}),
        ("xet", "lost", {"path": XORB}),
    ],
)
def test_the_client_gets_over_a_passing_fault(
    server: Hub,
    model: Path,
    repo: str,
    news: News,
    transport: str,
    kind: str,
    more: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    ask: Client = request.getfixturevalue(transport)
    server.fault(kind, **more)
    pushed = ask("push", model=model, repo=repo)
    assert "oid" in pushed, pushed
    (hit,) = (line for line in news() if line["fault"])
    assert (hit["fault"], hit["status"]) == (kind, more.get("status"))
    if kind == "reset" and "after" in more:
        assert MIB // 2 <= hit["bytes_in"] < MIB
    assert server.files(repo).items() > digests(model).items()


@pytest.mark.parametrize(
    ("transport", "kind", "more", "status", "says"),
    [
        ("lfs", "etag", {"path": r"/storage/\w+/2"}, 400, "InvalidPart"),
        ("lfs", "quota", {"path": "/objects/batch"}, 403, "storage limit reached"),
        ("lfs", "status", {"path": "/commit/", "status": 412}, 412, "injected 412"),
        ("lfs", "status", {"path": "/commit/", "status": 503}, 503, "injected 503"),
        ("xet", "quota", {"path": "/xet-write-token/"}, None, "403 Forbidden"),
        ("xet", "status", {"path": XORB, "status": 503, "times": None}, None, "503 Service"),
    ],
)
def test_a_fault_that_stays_ends_the_push_and_nothing_is_committed(
    server: Hub,
    model: Path,
    repo: str,
    transport: str,
    kind: str,
    more: dict[str, Any],
    status: int | None,
    says: str,
    request: pytest.FixtureRequest,
) -> None:
    ask: Client = request.getfixturevalue(transport)
    server.fault(kind, **more)
    failed = ask("push", model=model, repo=repo)
    assert (failed.get("status"), says in failed["says"]) == (status, True), failed
    assert list(server.files(repo)) == [".gitattributes"]
    server.no_faults()
    assert "oid" in ask("push", model=model, repo=repo)


def test_a_lost_answer_to_a_commit_leaves_the_commit(
    server: Hub, lfs: Client, model: Path, repo: str
) -> None:
    server.fault("lost", path="/commit/")
    failed = lfs("push", model=model, repo=repo)
    assert failed["error"] == "ReadError", failed
    assert [c.title for c in server.commits(repo)] == ["a model", "initial commit"]


def test_a_truncated_download_is_repeated_and_a_slow_one_is_slow(
    server: Hub, lfs: Client, model: Path, repo: str, news: News, tmp_path: Path
) -> None:
    lfs("push", model=model, repo=repo)
    whole = digests(model)["model-1.safetensors"][1]
    server.fault("truncate", path=whole, after=MIB)
    server.fault("slow", path=whole, rate=2 * MIB)
    assert lfs("pull", repo=repo, folder=tmp_path / "pulled")["wrong"] == []
    cut, again = (line for line in news() if line["path"] == f"/cdn/{whole}")
    assert (cut["bytes_out"], again["bytes_out"]) == (MIB, 5 * MIB // 2)
    assert again["seconds"] > 1


@TRANSPORTS
def test_a_killed_client_leaves_the_branch_and_the_next_one_completes_it(
    server: Hub,
    model: Path,
    repo: str,
    news: News,
    tmp_path: Path,
    transport: str,
    request: pytest.FixtureRequest,
) -> None:
    server.fault("slow", path=rf"/storage/\w+/3|{XORB}", rate=MIB // 64)
    with client(server, tmp_path, **(LFS if transport == "lfs" else XET)) as first:
        first.ask("push", model=model, repo=repo)
        until = time.monotonic() + 30
        while not any("/storage/" in x["path"] or "grants" in x["path"] for x in news()):
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.2)
    assert list(server.files(repo)) == [".gitattributes"]
    server.no_faults()
    ask: Client = request.getfixturevalue(transport)
    ask("push", model=model, repo=repo)
    assert server.files(repo).items() > digests(model).items()
    assert len(server.commits(repo)) == 2


def test_a_commit_of_damaged_content_is_refused(
    server: Hub, xet: Client, model: Path, repo: str
) -> None:
    path, cas = model / "model-1.safetensors", server.folder / "cas"
    refused = xet("commit_after_damage", path=path, repo=repo, cas=cas)
    assert "LFS pointer pointed to a file that does not exist" in refused
    assert list(server.files(repo)) == [".gitattributes"]


def test_two_clients_at_once_make_two_commits(
    server: Hub, lfs: Client, xet: Client, model: Path, repo: str, tmp_path: Path
) -> None:
    lfs("push", model=model, repo=repo)
    other = tmp_path / "other"
    other.mkdir()
    (other / "other.safetensors").write_bytes(Random(repo).randbytes(MIB))
    (model / "model-1.safetensors").write_bytes(bytes(9))
    lfs.ask("push", model=model, repo=repo)
    xet("push", model=other, repo=repo)
    assert "oid" in lfs.answer()
    assert len(server.commits(repo)) == 4
    assert server.files(repo).items() > digests(model).items() | digests(other).items()


def test_an_upload_with_other_bytes_than_announced_is_refused(
    server: Hub, lfs: Client, model: Path, repo: str
) -> None:
    lfs("push", model=model, repo=repo)
    data = repo.encode()
    oid, size = hashlib.sha256(data).hexdigest(), len(data)
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
    request = urllib.request.Request(
        f"{server.endpoint}/{repo}.git/info/lfs/objects/batch",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {server.env()['HF_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as answer:
        (granted,) = json.load(answer)["objects"]
    for wrong in (data[:-1], data + b"x", bytes(size)):
        put = urllib.request.Request(granted["actions"]["upload"]["href"], wrong, method="PUT")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(put)
    assert not (server.folder / "blobs" / oid).exists()
