"""Pushes and pulls on a bad line: what is there afterwards, and that the same command goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from faults.forks import Forks
from hub_clients import Client, run_of, sent, warm_clients
from hub_server import Hub, hub

from converters.zero import checkpoint

SHARDS = ("--max-shard-size", "10KB")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(
        tmp_path_factory.mktemp("hub") / "hub", part_size=4000, multipart_over=4000
    ) as running:
        yield running


@pytest.fixture(scope="module")
def warm(server: Hub) -> Iterator[Forks]:
    with warm_clients(server) as forks:
        yield forks


@pytest.fixture
def client(server: Hub, warm: Forks, tmp_path: Path) -> Iterator[Client]:
    run_of(tmp_path / "out")
    yield Client(server, tmp_path, forks=warm)
    server.no_faults()


@pytest.fixture
def alone(client: Client) -> Client:
    """A client of a server that has no content yet, of any repository."""
    client.hub.empty()
    return client


@pytest.fixture
def repo() -> str:
    return f"org/model-{uuid4().hex[:8]}"


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_an_interrupted_push_goes_on_with_what_the_hub_does_not_have(
    alone: Client, repo: str, way: str
) -> None:
    alone.push("out", repo, "--dtype", "bf16")
    head = alone.hub.branches(repo)["main"]
    alone.hub.fault("quota", path="/commit/", times=1)
    said = alone("push", "out", repo, *SHARDS, "--transport", way, fails=1)
    assert "storage" in said and alone.hub.branches(repo)["main"] == head
    before = len(alone.hub.journal())
    facts = alone.push("out", repo, *SHARDS, "--transport", way)
    assert facts["new_commit"] and not [n for n in sent(facts) if n.endswith(".safetensors")]
    asked = [one["path"] for one in alone.hub.journal()[before:]]
    assert alone.requests("PUT" if way == "lfs" else "GET", "storage|xet-write")
    assert not [path for path in asked if "/storage/" in path or "xet-write" in path]


def test_a_journal_that_lies_is_found_out(client: Client, repo: str) -> None:
    client.push("out", repo)
    (journal,) = (client.folder / "home/cache/ckpt/push").iterdir()
    text = journal.read_text()
    (name,) = [one for one in client.hub.files(repo) if one.endswith(".safetensors")]
    digest = client.hub.files(repo)[name][1]
    journal.write_text(text.replace(digest, "0" * 64))
    other = f"{repo}-other"
    assert "has other bytes than when an earlier push read it" in client(
        "push", "out", other, fails=1
    )
    facts = client.push("out", other)
    assert facts["new_commit"] and client.hub.files(other)[name][1] == digest
    journal.write_text("no json")
    assert not client.push("out", other)["new_commit"]


@pytest.mark.parametrize(
    ("kind", "path", "more"),
    [
        ("status", "/commit/", {"status": 503, "retry_after": 1}),
        ("status", "/commit/", {"status": 429, "retry_after": 1}),
        ("lost", "/commit/", {}),
        ("reset", "/commit/", {"after": 100}),
        ("status", "/preupload/", {"status": 500}),
        ("status", "/tree/", {"status": 502}),
        ("lost", "/branch/", {"method": "POST"}),
    ],
)
def test_a_bad_moment_is_waited_out_and_one_commit_is_made(
    client: Client, repo: str, kind: str, path: str, more: dict[str, int]
) -> None:
    client.push("out", repo)
    before = len(client.hub.commits(repo))
    client.hub.fault(kind, path=path, times=1, **more)
    revision = ("--revision", "step-2") if path == "/branch/" else ()
    facts = client.push("out", repo, "--dtype", "bf16", *revision)
    branch = "step-2" if revision else "main"
    assert len(client.hub.commits(repo, branch)) == before + 1
    assert client.hub.branches(repo) | {branch: facts["oid"]} == client.hub.branches(repo)
    assert not [name for name in client.hub.branches(repo) if "partial" in name]


@pytest.mark.parametrize(
    ("kind", "more"), [("reset", {"after": 1000}), ("status", {"status": 500}), ("etag", {})]
)
def test_a_part_that_breaks_off_is_sent_again(
    alone: Client, repo: str, kind: str, more: dict[str, int]
) -> None:
    alone.hub.fault(kind, path="/storage/", method="PUT", times=1, skip=1, **more)
    args = ("out", repo, "--transport", "lfs")
    if kind == "etag":  # the store contradicts itself: the client cannot mend that
        alone("push", *args, fails=1)
        assert "model.safetensors" not in alone.hub.files(repo)
    facts = alone.push(*args)
    assert [one for one in alone.hub.journal() if one["fault"]]
    assert facts["new_commit"] and alone.hub.files(repo)["model.safetensors"][0] == 25960


MOVED = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from ckpt.hub.push import PushOptions, execute, plan
from ckpt.runs.run import open_checkpoint
checkpoint = open_checkpoint(Path("out/checkpoint-2"))
planned = plan(checkpoint, sys.argv[1], PushOptions(dtype="bf16"))
HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="x.txt", repo_id=sys.argv[1])
try:
    execute(planned)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_branch_that_somebody_else_changed_is_left_as_they_left_it(
    client: Client, repo: str
) -> None:
    client.push("out", repo)
    said = client.python(MOVED, repo).stdout
    assert said.startswith("CheckpointError") and "somebody else changed main" in said
    assert client.hub.files(repo)["model.safetensors"][0] == 25960
    assert client.hub.commits(repo)[0].title.startswith("Upload x.txt")
    assert client.push("out", repo, "--dtype", "bf16")["new_commit"]


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_damaged_weights_are_never_committed(client: Client, repo: str, way: str) -> None:
    weights = checkpoint.read(client.folder / "out/checkpoint-2").weights
    extent = weights.tensors["lm_head.weight"].extents[-1]
    data = bytearray(extent.path.read_bytes())
    data[extent.offset + 3] ^= 64
    extent.path.write_bytes(data)  # the same size: the manifest's sizes say nothing
    said = client("push", "out", repo, "--transport", way, fails=1)
    assert "optim_states.pt" in said and ("damaged" in said or "other values" in said)
    assert client.hub.files(repo).keys() == {".gitattributes"}
    said = client("push", "out", repo, "--transport", way, fails=1)  # nor by a second try
    assert client.hub.files(repo).keys() == {".gitattributes"}


def test_a_repository_that_ignores_weights_is_not_left_without_them(
    client: Client, repo: str
) -> None:
    code = (
        "import sys; from huggingface_hub import HfApi; api = HfApi()\n"
        "api.create_repo(sys.argv[1], private=True)\n"
        "api.upload_file(path_or_fileobj=b'*.safetensors\\n', path_in_repo='.gitignore', "
        "repo_id=sys.argv[1])"
    )
    client.python(code, repo)
    assert "its .gitignore keeps model.safetensors out" in client("push", "out", repo, fails=1)
    assert "config.json" not in client.hub.files(repo)


def test_a_pull_that_breaks_off_goes_on_and_appears_whole(client: Client, repo: str) -> None:
    client.push("out", repo, *SHARDS)
    plain = Client(client.hub, client.folder, {"HF_HUB_DISABLE_XET": "1"})
    client.hub.fault("status", path="/cdn/|/resolve/.*00003-of", status=403, method="GET", times=1)
    killed = client.folder / ".model.partial/.cache/huggingface/download/a.0123abcd.incomplete"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(bytes(1000))  # of a pull that was killed: the client never looks at it
    plain("pull", repo, "model", fails=1)
    assert not (client.folder / "model").exists() and not killed.exists()
    before = len(client.hub.journal())
    plain("pull", repo, "model")
    files = {p.name for p in (client.folder / "model").iterdir()}
    assert files == client.hub.files(repo).keys()
    got = [one for one in client.hub.journal()[before:] if one["method"] == "GET"]
    assert sum(one["bytes_out"] for one in got) < sum(s for s, _ in client.hub.files(repo).values())
    assert not [p for p in client.folder.iterdir() if p.name.startswith(".")]
    assert "exists already" in plain("pull", repo, "model", fails=1)


def test_a_staged_file_with_other_bytes_is_fetched_again(client: Client, repo: str) -> None:
    client.push("out", repo)
    code = (
        "import sys; from huggingface_hub import snapshot_download\n"
        "snapshot_download(sys.argv[1], local_dir='.model.partial')"
    )
    client.python(code, repo)
    staged = client.folder / ".model.partial/model.safetensors"
    held = bytearray(staged.read_bytes())
    held[-1] ^= 1
    stat = staged.stat()
    staged.write_bytes(held)
    os.utime(staged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (client.folder / ".model.partial/left.txt").write_text("of another commit")
    client("pull", repo, "model")
    assert not (client.folder / "model/left.txt").exists()
    assert (client.folder / "model/model.safetensors").read_bytes() == client.hub.read(
        repo, "model.safetensors"
    )


def test_a_hub_that_gives_other_bytes_than_it_lists_is_refused(alone: Client, repo: str) -> None:
    alone.push("out", repo, "--transport", "lfs")
    blob = alone.hub.folder / "blobs" / alone.hub.files(repo)["model.safetensors"][1]
    held = bytearray(blob.read_bytes())
    held[-1] ^= 1
    blob.write_bytes(held)
    assert "came with other bytes" in alone("pull", repo, "model", fails=1)
    assert not (alone.folder / "model").exists()


def test_names_that_leave_the_folder_are_refused_before_anything_is_fetched(
    client: Client, repo: str
) -> None:
    code = (
        "import sys; from huggingface_hub import HfApi; api = HfApi()\n"
        "api.create_repo(sys.argv[1], private=True)\n"
        "api.upload_file(path_or_fileobj=b'x', path_in_repo='escapes.txt', repo_id=sys.argv[1])"
    )
    client.python(code, repo)
    for path in (client.hub.folder / "repos").rglob("*.json"):  # a Hub that lets such a name in
        path.write_text(path.read_text().replace('"escapes.txt"', '"../escapes.txt"'))
    said = client("pull", repo, "model", fails=1)
    assert "'../escapes.txt', which is not a plain path" in said
    assert {p.name for p in client.folder.iterdir()} <= {"out", "home"}


@pytest.mark.parametrize(("kind", "more"), [("status", {"status": 403}), ("reset", {"after": 500})])
def test_a_xet_store_that_fails_is_one_line_or_is_waited_out(
    alone: Client, repo: str, kind: str, more: dict[str, int]
) -> None:
    alone.hub.fault(kind, path="/xorbs?/", times=1, **more)
    if kind == "status":
        said = alone("push", "out", repo, fails=1)
        assert "the Xet upload failed" in said and "--transport lfs" in said
        assert alone.hub.files(repo).keys() == {".gitattributes"}
    assert alone.push("out", repo)["new_commit"]
    assert [one for one in alone.hub.journal() if one["fault"]]
