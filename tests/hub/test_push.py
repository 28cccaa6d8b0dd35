"""``ckpt push`` and ``ckpt pull`` against the local Hub, with the client that everybody uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from faults.forks import Forks
from hub_clients import Client, run_of, sent, warm_clients
from hub_server import READ_TOKEN, TOKEN, Hub, hub
from json_table import require_documented
from oracles import convert, same


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub") / "hub"
    with hub(folder, part_size=8000, multipart_over=8000) as running:
        yield running


@pytest.fixture(scope="module")
def warm(server: Hub) -> Iterator[Forks]:
    with warm_clients(server) as forks:
        yield forks


@pytest.fixture
def client(server: Hub, warm: Forks, tmp_path: Path) -> Client:
    run_of(tmp_path / "out")
    return Client(server, tmp_path, forks=warm)


@pytest.fixture
def repo() -> str:
    return f"org/model-{uuid4().hex[:8]}"


def test_the_pulled_model_is_the_oracle_bit_for_bit(client: Client, repo: str) -> None:
    facts = client.push("out/checkpoint-2", repo, "--verify-download", "--max-shard-size", "20KB")
    assert facts["transport"] == "xet" and len(sent(facts)) == 8
    assert facts["checks"]["crc32_bytes"] > 20000 and facts["checks"]["compared_tensors"] == 21
    client("pull", repo, "model")
    theirs = convert(
        client.folder / "out/checkpoint-2", client.folder / "oracle", "--max-shard-size", "20KB"
    )
    for path in (client.folder / "oracle").iterdir():
        if path.name != "conversion.json":
            assert (client.folder / "model" / path.name).read_bytes() == path.read_bytes()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(client.folder / "model", dtype=torch.float32)
    held = model.state_dict()
    assert all(same(held[name], value) for name, value in theirs.items())
    assert client.hub.repo(repo)["visibility"] == "private"


@pytest.mark.parametrize("way", ["lfs", "stage"])
def test_every_transport_sends_the_same_bytes(client: Client, repo: str, way: str) -> None:
    options = ["--transport", "lfs"] if way == "lfs" else ["--stage-dir", "stage"]
    facts = client.push("out", repo, "--dtype", "bf16", "--verify-download", *options)
    assert facts["transport"] == way
    convert(client.folder / "out/checkpoint-2", client.folder / "oracle", "--dtype", "bf16")
    ours = (client.folder / "oracle/model.safetensors").read_bytes()
    assert client.hub.read(repo, "model.safetensors") == ours
    if way == "stage":
        assert list((client.folder / "stage").iterdir()) == []
    else:
        parts = [r for r in client.requests("PUT") if r["bytes_in"]]
        assert parts and max(r["bytes_in"] for r in parts) <= 8000  # several parts, read by seeking


def test_without_xet_shards_go_by_lfs_and_a_line_says_why(server: Hub, client: Client) -> None:
    plain = Client(server, client.folder, {"HF_HUB_DISABLE_XET": "1"})
    code = "import sys; from ckpt.cli.main import main; main(sys.argv[1:])"
    done = plain.python(code, "push", "out", f"org/m-{uuid4().hex[:8]}")
    assert "HF_HUB_DISABLE_XET is set; shards go by LFS" in done.stderr
    said = plain("push", "out", "org/x", "--transport", "xet", fails=1)
    assert "the transport xet is not possible: HF_HUB_DISABLE_XET is set" in said


def test_an_untested_client_is_not_trusted_with_private_fields(client: Client) -> None:
    code = (
        "import ckpt.hub.client.xet as t\n"
        "t.TESTED = (('2.4.0', '1.7.9'),)\n"
        "from ckpt.hub import upload; print(*upload.choose('auto', None))"
    )
    said = client.python(code).stdout
    assert said.startswith("lfs") and "were not tested with it" in said


def test_a_second_push_makes_no_commit_and_sends_nothing(client: Client, repo: str) -> None:
    first = client.push("out", repo)
    before = len(client.hub.journal())
    again = client.push("out", repo)
    assert again["url"] == first["url"] and not again["new_commit"] and sent(again) == []
    asked = client.hub.journal()[before:]
    assert {one["method"] for one in asked} == {"GET"}
    done = client._fork(["push", "out", repo], 0)
    assert done.stdout.strip() == first["url"]
    assert "0 files sent (0 B), 5 were there, all verified" in done.stderr
    assert "; its README.md stays as it is; no commit was needed" in done.stderr
    cache = {"XDG_CACHE_HOME": str(client.folder / "empty")}
    other = Client(client.hub, client.folder, cache, client.forks)
    # no journal there: read, and found to be there
    assert not other.push("out", repo)["new_commit"]
    assert len(client.hub.commits(repo)) == len(client.hub.commits(repo, first["oid"]))


def test_what_push_and_pull_print_is_in_the_table_of_json(client: Client, repo: str) -> None:
    require_documented("push", json.loads(client("push", "out", repo, "--dry-run", "--json")))
    require_documented("push", client.push("out", repo))
    pulling = ("pull", repo, "model")
    planned = json.loads(client(*pulling, "--dry-run", "--json"))
    assert not (client.folder / "model").exists() and planned["seconds"] is None
    pulled = json.loads(client(*pulling, "--json"))
    assert pulled["files"] == planned["files"] and pulled["bytes"] == planned["bytes"]
    for document in (planned, pulled):
        require_documented("pull", document)


def test_a_dry_run_says_what_would_be_sent_and_changes_nothing(client: Client, repo: str) -> None:
    before = len(client.hub.journal())
    said = client("push", "out", repo, "--dry-run")
    assert "send\tmodel.safetensors\t25.96 kB" in said and "would be created, private" in said
    assert "left out\ttraining_args.bin" in said
    facts = json.loads(client("push", "out", repo, "--dry-run", "--json"))
    assert facts["dry_run"] and "model.safetensors" in [one["name"] for one in facts["files"]]
    assert {one["method"] for one in client.hub.journal()[before:]} == {"GET"}


def test_only_committed_or_complete_checkpoints_are_pushed(client: Client, repo: str) -> None:
    (client.folder / "out/checkpoint-2/manifest.json").unlink()
    assert client.push("out/checkpoint-2", repo)["new_commit"]
    (client.folder / "out/checkpoint-2/scheduler.pt").unlink()
    said = client("push", "out/checkpoint-2", repo, fails=1)
    assert "is not complete: has no scheduler.pt" in said and "--uncommitted" in said
    assert "has no scheduler.pt" in client("push", "out", repo, fails=1)
    assert not client.push("out/checkpoint-2", repo, "--uncommitted")["new_commit"]
    run_of(client.folder / "torn")
    (client.folder / "torn/checkpoint-2/scheduler.pt").write_bytes(b"")
    assert "is not whole" in client("push", "torn/checkpoint-2", repo, fails=1)


def test_the_best_of_a_run_is_pushed_and_nan_is_never_best(client: Client, repo: str) -> None:
    for step, loss in (4, 0.5), (6, float("nan")), (8, 0.7):
        run_of(client.folder / "out", step, {"eval_loss": loss})
    facts = client.push("out", repo, "--best", "eval_loss:min")
    assert facts["step"] == 4
    assert client.push("out", repo)["step"] == 8
    said = client("push", "out", repo, "--best", "accuracy:max", fails=1)
    assert "holds 0 committed or complete checkpoints with the metric accuracy" in said


def test_an_older_push_of_other_shards_goes_and_a_users_files_stay(
    client: Client, repo: str
) -> None:
    client.push("out", repo, "--max-shard-size", "20KB")
    code = (
        "import sys; from huggingface_hub import HfApi; api = HfApi()\n"
        "for name in 'README.md', 'a.txt', 'model-extra.safetensors', 'sub/model.safetensors':\n"
        "    api.upload_file(path_or_fileobj=b'mine', path_in_repo=name, repo_id=sys.argv[1])\n"
    )
    client.python(code, repo)
    facts = client.push("out", repo, "--dtype", "bf16")
    assert facts["deleted"] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    held = client.hub.files(repo)
    assert {"model.safetensors", "model-extra.safetensors", "sub/model.safetensors"} <= held.keys()
    assert client.hub.read(repo, "README.md") == b"mine"  # a card is never written over
    assert not any("-of-" in name for name in held)


def test_a_new_revision_shows_only_what_is_whole(client: Client, repo: str) -> None:
    client.push("out", repo)
    client.hub.fault("quota", path="/commit/", times=1)
    assert "storage" in client(
        "push", "out", repo, "--revision", "step-2", "--dtype", "bf16", fails=1
    )
    assert client.hub.branches(repo).keys() == {"main"}
    facts = client.push("out", repo, "--revision", "step-2", "--dtype", "bf16")
    assert client.hub.branches(repo).keys() == {"main", "step-2"}
    assert client.hub.branches(repo)["step-2"] == facts["oid"]
    assert client.hub.files(repo)["model.safetensors"][0] == 25960
    client("pull", f"{repo}@step-2", "model")
    assert (client.folder / "model/model.safetensors").stat().st_size == 14024


def test_older_steps_go_and_nothing_else_does(client: Client, repo: str) -> None:
    for name in ("step-1", "step-2", "step-10", "other"):
        client.push("out", repo, "--revision", name)
    facts = client.push("out", repo, "--revision", "step-3", "--keep-last", "2")
    assert facts["deleted_revisions"] == ["step-1"]
    assert client.hub.branches(repo).keys() == {"main", "step-2", "step-3", "step-10", "other"}
    client.push("out", repo, "--path-in-repo", "step-1")
    facts = client.push("out", repo, "--path-in-repo", "step-2", "--keep-last", "1")
    assert facts["deleted"] == ["step-1/"]
    folders = {name.split("/")[0] for name in client.hub.files(repo) if "/" in name}
    assert folders == {"step-2"}
    said = client("push", "out", repo, "--keep-last", "1", fails=1)
    assert "such as step-500" in said


def test_a_pull_request_leaves_the_branch_alone(client: Client, repo: str) -> None:
    first = client.push("out", repo)
    facts = client.push("out", repo, "--create-pr", "--dtype", "bf16", "--message", "smaller")
    assert facts["pull_request"].endswith("/discussions/1")
    assert client.hub.branches(repo) == {"main": first["oid"]}
    client("pull", f"{repo}@refs/pr/1", "model")
    assert (client.folder / "model/model.safetensors").stat().st_size == 14024
    said = client("push", "out", repo, "--create-pr", "--revision", "none", fails=1)
    assert "a pull request needs one that is there" in said


def test_a_dry_run_of_a_pull_says_no_where_the_pull_says_no(client: Client, repo: str) -> None:
    client.push("out", repo, "--include-training-state")
    client("pull", repo, "new/model", "--dry-run")
    (client.folder / "file").touch()
    for options in (["--dry-run"], []):
        assert "file is not a" in client("pull", repo, "file/model", *options, fails=1)
        said = client("pull", repo, "out/checkpoint-2/model", *options, fails=1)
        assert "lies inside of the checkpoint" in said
    assert not (client.folder / "new").exists()


def test_a_training_state_goes_to_another_machine_and_is_whole_there(
    client: Client, repo: str
) -> None:
    client.push("out", repo, "--include-training-state")
    client("pull", repo, "back/checkpoint-2")
    assert ": whole" in client("verify", "back/checkpoint-2", "--data")
    here, there = client.folder / "out/checkpoint-2", client.folder / "back/checkpoint-2"
    for path in (p for p in here.rglob("*") if p.is_file()):
        assert (there / path.relative_to(here)).read_bytes() == path.read_bytes()
    said = client("push", "out", f"{repo}-p", "--public", "--include-training-state", fails=1)
    assert "private repositories only" in said


def test_a_wrong_login_is_one_line_and_no_token_is_written_anywhere(
    client: Client, server: Hub, repo: str
) -> None:
    client.push("out", repo)
    for token, words in (
        ("hf_wrong_token", "does not accept this login"),
        (READ_TOKEN, "the login needs write access"),
    ):
        other = Client(server, client.folder, {"HF_TOKEN": token}, client.forks)
        said = other("push", "out", repo, "--dtype", "fp16", fails=1)
        assert words in said and token not in said
    assert "is not there" in client("pull", f"{repo}-none", "model", fails=1)
    assert "cannot reach the Hub" in Client(
        server, client.folder, {"HF_ENDPOINT": "http://127.0.0.1:9"}
    )("pull", repo, "model", fails=1)
    written = [p for p in client.folder.rglob("*") if p.is_file()]
    assert len(written) > 10
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]


def test_a_broken_folder_fails_before_the_hub_is_asked(client: Client, repo: str) -> None:
    model = client.folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"broken")
    before = len(client.hub.journal())
    assert "model.safetensors" in client("push", "model", repo, fails=1)
    config = client.folder / "out/checkpoint-2/config.json"
    config.write_text("{")
    assert "config.json" in client("push", "out/checkpoint-2", repo, "--uncommitted", fails=1)
    assert len(client.hub.journal()) == before
