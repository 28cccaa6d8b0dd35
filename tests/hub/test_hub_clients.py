"""``ckpt push`` and ``ckpt pull`` beside clients and on systems that they were not written with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from uuid import uuid4

import pytest
from hub_clients import Client, run_of, sent
from hub_server import Hub, hub
from oracles import convert

# Private parts of huggingface_hub that ckpt knows: the day that a new client appears they may have
# other names.
PRIVATE = (
    *("_fetch_upload_modes", "_upload_mode", "_should_ignore", "_is_uploaded"),
    *("xet_connection_info_refresh_url", "xet_headers_without_auth", "XetTokenType"),
    *("post_lfs_batch_info", "UploadInfo", "_build_hf_headers"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(tmp_path_factory.mktemp("hub") / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def new_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed client as a release of tomorrow: version 99, and no private name as it was."""
    folder = tmp_path_factory.mktemp("client")
    installed = distribution("huggingface_hub")
    source = Path(str(installed.locate_file("huggingface_hub")))
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in PRIVATE))
    changed = 0
    for path in (folder / source.name).rglob("*.py"):
        text, count = pattern.subn(lambda match: f"{match[0]}_of_99", path.read_text("utf-8"))
        path.write_text(text, "utf-8")
        changed += count
    assert changed > 50
    information = folder / "huggingface_hub-99.0.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: huggingface_hub\nVersion: 99.0.0\n", "utf-8"
    )
    return folder


def test_the_day_a_new_client_appears_pushes_still_work(
    server: Hub, new_client: Path, tmp_path: Path
) -> None:
    run_of(tmp_path / "out")
    client = Client(server, tmp_path)
    path = f"{new_client}:{client.env()['PYTHONPATH']}"
    client = Client(server, tmp_path, {"PYTHONPATH": path})
    repo = f"org/m-{uuid4().hex[:8]}"

    options = ("--json", "--max-shard-size", "20KB", "--verify-download")
    command = [sys.executable, "-m", "ckpt", "push", "out", repo, *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=client.env(), capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    facts = json.loads(done.stdout)
    assert facts["transport"] == "lfs" and facts["new_commit"]
    assert "huggingface_hub 99.0.0 and hf_xet" in done.stderr
    assert "were not tested with it" in done.stderr

    again = client.push("out", repo, *options[1:])
    assert not again["new_commit"]
    client("pull", repo, "model")
    convert(tmp_path / "out/checkpoint-2", tmp_path / "expected", "--max-shard-size", "20KB")
    for path_there in (tmp_path / "expected").iterdir():
        if path_there.name != "conversion.json":
            assert (tmp_path / "model" / path_there.name).read_bytes() == path_there.read_bytes()


IN_ONE_PROCESS = """
import contextlib, io, json, sys
import other_systems
other_systems.become(sys.argv[1])
from ckpt.cli.main import main
printed = []
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main(words)
        except SystemExit as end:
            if end.code:
                raise
    printed.append(output.getvalue())
print(json.dumps(printed))
"""
WAYS = {  # what they send differs: the server has the contents of none before
    "xet": ("--dtype", "bf16"),
    "lfs": ("--dtype", "fp16"),
    "stage": ("--max-shard-size", "20KB"),
}


@pytest.mark.parametrize("system", ["macos", "windows"])
def test_models_go_to_the_hub_and_back_on_other_systems(
    server: Hub, system: str, tmp_path: Path
) -> None:
    run_of(tmp_path / "out")
    server.empty()
    client = Client(server, tmp_path)
    commands = []
    for way, options in WAYS.items():
        repo, by = f"org/{system}-{way}", ("--transport", way)
        by = (*by, "--stage-dir", "stage") if way == "stage" else by
        commands += [("push", "out", repo, "--json", *options, *by), ("pull", repo, way)]

    done = client.python(IN_ONE_PROCESS, system, json.dumps(commands))
    printed = json.loads(done.stdout)
    for (way, options), text in zip(WAYS.items(), printed[::2], strict=True):
        facts = json.loads(text)
        assert facts["transport"] == way and facts["new_commit"]
        assert [name for name in sent(facts) if name.endswith(".safetensors")]
        expected = tmp_path / f"expected-{way}"
        convert(tmp_path / "out/checkpoint-2", expected, *options)
        for path in expected.iterdir():
            if path.name != "conversion.json":
                assert (tmp_path / way / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*"))
