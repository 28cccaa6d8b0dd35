"""Pushes of what ckpt did not commit: complete checkpoints, and folders of models as they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import torch.distributed.checkpoint as dcp
from faults.forks import Forks
from heavy_libraries import peft, transformers
from hub_clients import Client, sent, warm_clients
from hub_server import Hub, hub
from json_table import require_documented
from oracles import ROOT, convert, run, same, weights_in
from run_folders import SOURCE as TRAINER
from safetensors.torch import load_file
from stock_checkpoints import STOCK, accelerates, trainers

from ckpt.hub.content.contents import Contents, contents
from ckpt.hub.plan import PushOptions, plan
from ckpt.hub.select import chosen
from ckpt.runs.run import open_checkpoint
from ckpt.runs.states.status import status_of
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.plan import Shard

README = {  # the commands of README's first five minutes, on a checkpoint and its run
    "show": ("show", "CHECKPOINT"),
    "to-fp32": ("to-fp32", "CHECKPOINT", "-o", "model"),
    "ls": ("ls", "RUN"),
    "verify": ("verify", "CHECKPOINT", "--data"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(tmp_path_factory.mktemp("hub") / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def warm(server: Hub) -> Iterator[Forks]:
    with warm_clients(server) as forks:
        yield forks


@pytest.fixture
def client(server: Hub, warm: Forks, tmp_path: Path) -> Client:
    return Client(server, tmp_path, forks=warm)


@pytest.fixture
def repo() -> str:
    return f"org/model-{uuid4().hex[:8]}"


@pytest.mark.parametrize("front_end", STOCK)
def test_the_first_five_minutes_of_a_stock_checkpoint(
    front_end: str, client: Client, repo: str
) -> None:
    """Show, to-fp32, ls, verify and push succeed, in this order, on one folder."""
    checkpoint = STOCK[front_end](client.folder / "out")
    name = checkpoint.relative_to(client.folder)
    for command in README.values():
        paths = {"CHECKPOINT": name, "RUN": "out"}
        assert client(*(paths.get(word, word) for word in command))
    facts = client.push(name, repo)
    assert facts["new_commit"]
    client("pull", repo, "back")
    expected, back = weights_in(client.folder / "model"), weights_in(client.folder / "back")
    assert expected.keys() == back.keys()
    assert all(same(back[key], value) for key, value in expected.items())

    again = client.push("model", repo)  # what to-fp32 wrote is the same model
    assert "model.safetensors" not in sent(again)


def test_readmes_own_commands_succeed_in_their_order(client: Client) -> None:
    """As they are typed from the source's folder, with the local Hub in the place of the Hub."""
    text = (ROOT / "README.md").read_text()
    minutes = text.partition("## The first five minutes")[2].partition("\n## ")[0]
    commands = re.findall(r"^((?:ckpt|mkdir) .*)$", minutes, re.M)
    verbs = [command.split()[1] for command in commands if command.startswith("ckpt")]
    assert verbs == ["show", "to-fp32", "ls", "verify", "push"]

    (client.folder / "fixtures").symlink_to(ROOT / "fixtures")
    shell = 'ckpt() { "$PYTHON" -m ckpt "$@"; }\nset -eu\n' + "\n".join(commands)
    environment = client.env() | {"PYTHON": sys.executable}
    subprocess.run(["bash", "-c", shell], cwd=client.folder, env=environment, check=True)
    folder = client.folder / "out/checkpoint-1-fp32"
    held = client.hub.read("org/name", "model.safetensors")
    assert held == (folder / "model.safetensors").read_bytes()


def test_a_run_is_pushed_by_its_newest_complete_checkpoint(client: Client, repo: str) -> None:
    for step in (1, 3):
        shutil.copytree(TRAINER, client.folder / f"out/checkpoint-{step}")
    code = "import sys; from ckpt.cli.main import main; main(sys.argv[1:])"
    done = client.python(code, "push", "out", repo, "--dry-run", "--json")
    facts = json.loads(done.stdout)
    require_documented("push", facts)
    assert facts["path"].endswith("out/checkpoint-3")
    assert "the newest checkpoint of out is out/checkpoint-3 (complete, not committed)" in (
        done.stderr
    )


def test_a_run_of_another_trainer_is_pushed_as_it_is_listed(tmp_path: Path) -> None:
    """Accelerate without DeepSpeed, into folders that the script named."""
    for step in (2, 4):
        accelerates(tmp_path / f"run/step_{step}")
    assert chosen(tmp_path / "run").checkpoint.folder == tmp_path / "run/step_4"


def test_what_is_not_complete_is_refused_with_what_is_missing(client: Client, repo: str) -> None:
    folder = Path(shutil.copytree(TRAINER, client.folder / "out/checkpoint-1"))
    (folder / "scheduler.pt").unlink()
    line = client("push", folder, repo, fails=1)
    assert line.startswith(f"ckpt: {folder} is not complete: has no scheduler.pt; --uncommitted")
    assert client.push(folder, repo, "--uncommitted")["new_commit"]
    states = folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    states.unlink()
    line = client("push", folder, repo, fails=1)
    assert "the optimizer files of rank 1 are missing" in line
    assert "optimizer files of rank 1" in client("push", folder, repo, "--uncommitted", fails=1)


def test_the_16bit_weights_are_pushed_without_the_optimizers_files(
    client: Client, repo: str
) -> None:
    folder = Path(shutil.copytree(TRAINER, client.folder / "run/checkpoint-2"))
    for path in folder.glob("*/*_optim_states.pt"):
        path.unlink()
    line = client("push", folder, repo, fails=1)
    assert "no optimizer files" in line and "--weights 16bit pushes those" in line
    facts = client.push(folder, repo, "--weights", "16bit")
    assert "model.safetensors" in {file["name"] for file in facts["files"]}
    more = ("--weights", "16bit", "--include-training-state")
    assert "no optimizer files" in client("push", folder, repo, *more, fails=1)
    next(folder.glob("*/mp_rank_00_model_states.pt")).unlink()
    client("push", folder, repo, "--weights", "16bit", fails=1)


def test_a_tokenizer_beside_the_checkpoints_is_sent_with_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TRAINER, tmp_path / "out/checkpoint-2"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder.parent / name)
    request = Request()
    for found in (of(folder, request=request), of(weights_alone(folder))):
        assert {"tokenizer.json", "tokenizer_config.json"} <= names(found)
        assert any("that of the folder above the checkpoint" in line for line in found.warnings)
    other = Path(shutil.copytree(folder, tmp_path / "out/model"))  # which is no checkpoint of a run
    assert not {name for name in names(of(other)) if name.startswith("tokenizer")}


def weights_alone(folder: Path) -> Path:
    """The same without the states, as ``save_only_model`` leaves it."""
    run("to-fp32", folder, "-o", folder.parent / "weights")
    other = folder.parent / "checkpoint-4"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder.parent / "weights" / name, other)
    return other


def test_a_model_folder_is_sent_as_it_is(client: Client, repo: str) -> None:
    """Whatever type it is stored in, in shards too; the card is made only where there is none."""
    options = ("--dtype", "bf16", "--max-shard-size", "8KB")
    run("to-fp32", TRAINER, "-o", client.folder / "model", *options)
    facts = client.push("model", repo, "--verify-download")
    assert facts["message"].startswith("Push model (bf16, step 2)")
    model = client.folder / "model"
    for name in facts["files"]:
        if name["name"] != "README.md":
            assert client.hub.read(repo, name["name"]) == (model / name["name"]).read_bytes()
    assert "published by ckpt" in client.hub.read(repo, "README.md").decode().lower()
    client("pull", repo, "back")
    transformers.AutoModelForCausalLM.from_pretrained(client.folder / "back")

    (model / "README.md").write_text("# mine\n")
    other = f"{repo}-2"
    client.push("model", other)
    assert client.hub.read(other, "README.md") == b"# mine\n"
    assert "holds BF16 weights" in client("push", "model", repo, "--dtype", "fp32", fails=1)


def of(folder: Path, **options: object) -> Contents:
    """What a push would send of a folder."""
    return contents(open_checkpoint(folder), max_shard_size=1 << 40, **options)  # type: ignore[arg-type]


def names(found: Contents) -> set[str]:
    return {item.name for item in found.items}


def test_of_a_checkpoint_of_fsdp_the_weights_are_sent(tmp_path: Path) -> None:
    """The card says what it was made of; what the model is loaded with comes along."""
    folder = tmp_path / "checkpoint-2"
    values = load_file(TRAINER / "model.safetensors")
    dcp.save({"model": values}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    shutil.copy(TRAINER / "config.json", folder)
    found = of(folder)
    assert names(found) == {"model.safetensors", "config.json", "README.md"}
    card = next(item.source for item in found.items if item.name == "README.md")
    assert isinstance(card, bytes)
    made_of = (
        b"from an FSDP checkpoint of Accelerate or the Trainer, of a training in bf16 on 1 rank"
    )
    assert made_of in card


@pytest.mark.parametrize("name", ["dist_epoch_0", "step-12", "gan", "ep0-ba2"])
def test_a_distributed_checkpoint_is_pushed_under_any_name(name: str, tmp_path: Path) -> None:
    values = load_file(TRAINER / "model.safetensors")
    folder = tmp_path / name
    if name == "ep0-ba2":  # composer's: model and optimizer in a folder each
        dcp.save(values, checkpoint_id=folder / "model", no_dist=True)
        optimizer = {"state": {key: {"step": torch.ones(())} for key in values}}
        dcp.save(optimizer, checkpoint_id=folder / "optim", no_dist=True)
    else:
        dcp.save({"model": values}, checkpoint_id=folder, no_dist=True)

    checkpoint = chosen(folder).checkpoint
    assert checkpoint.folder == folder
    assert "model.safetensors" in names(contents(checkpoint, max_shard_size=1 << 40))


def test_a_model_of_torch_save_is_sent_as_safetensors_with_the_same_values(tmp_path: Path) -> None:
    values = convert(TRAINER, tmp_path / "model", "--format", "bin", "--dtype", "bf16")
    found = of(tmp_path / "model")
    assert {"model.safetensors", "config.json", "README.md"} <= names(found)
    assert not [name for name in names(found) if name.endswith(".bin")]
    assert "are sent as safetensors, with the same values" in " ".join(found.warnings)
    assert found.conversion is not None
    assert {placement.dtype.value for placement in found.conversion.plan.placements()} == {"BF16"}
    assert found.conversion.product.weights.tensors.keys() == values.keys() - {"lm_head.weight"}
    card = next(item.source for item in found.items if item.name == "README.md")
    assert b"files of torch.save to safetensors, unchanged" in card


def test_the_values_of_a_pickled_model_arrive(client: Client, repo: str) -> None:
    values = convert(TRAINER, client.folder / "model", "--format", "bin", "--max-shard-size", "9KB")
    client.push("model", repo)
    client("pull", repo, "back")
    back = weights_in(client.folder / "back")
    assert all(same(back[key], value) for key, value in values.items() if key in back)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        client.folder / "back", dtype=torch.float32
    )
    assert all(same(model.state_dict()[key], value) for key, value in values.items())


def test_the_modules_of_a_sentence_model_are_sent_as_they_lie_there(tmp_path: Path) -> None:
    from stage0 import save_stage0
    from test_sentence_transformers import BERT, DENSE, put_surroundings

    values = {f"0.model.{name}": value for name, value in BERT.items()}
    root = save_stage0(tmp_path / "c", values | {f"2.{n}": value for n, value in DENSE.items()})
    put_surroundings(root)
    run("to-fp32", root, "-o", tmp_path / "model", "--check", "none")
    found = of(tmp_path / "model", request=Request(check="none"), card=False)
    there = {
        p.relative_to(tmp_path / "model").as_posix()
        for p in (tmp_path / "model").rglob("*")
        if p.is_file()
    }
    assert names(found) == there - {"conversion.json"}
    assert "2_Dense/model.safetensors" in there


def test_an_adapter_folder_is_sent_as_it_is(tmp_path: Path) -> None:
    run("to-fp32", TRAINER, "-o", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.name_or_path = "org/base"
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = of(tmp_path / "adapter")
    assert names(found) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert found.facts["kind"] == "adapter" and not found.conversion

    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, which is not published; load the ad"):
        of(tmp_path / "adapter")


@pytest.mark.parametrize("make", [trainers, accelerates])
def test_a_checkpoint_of_another_trainer_is_pushed_by_its_weights(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "checkpoint-6", *([6] if make is trainers else []))
    assert status_of(open_checkpoint(folder)).complete
    found = of(folder, card=False)
    assert names(found) == {"model.safetensors"} and found.conversion is None
    told = dict(found.left_out)
    assert {"scheduler.pt", "scheduler.bin"} & told.keys()


@pytest.mark.parametrize("damage", ["shard", "short", "bin", "names", "pointer"])
def test_a_model_that_would_not_load_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    options = ("--format", "bin") if damage == "bin" else ("--max-shard-size", "9KB")
    run("to-fp32", TRAINER, "-o", folder, *options)
    first = sorted(folder.glob("*.bin" if damage == "bin" else "*.safetensors"))[0]
    if damage == "shard":
        first.unlink()
    elif damage == "pointer":
        first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif damage == "names":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    else:
        with open(first, "r+b") as file:
            file.truncate(first.stat().st_size - 10)
    expected = {
        "shard": first.name,
        "short": first.name,
        "bin": "pytorch_model.bin",
        "names": "layers",
        "pointer": "git lfs pull",
    }[damage]
    with pytest.raises(CheckpointError, match=expected):
        of(folder)


def test_a_model_that_is_still_being_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("to-fp32", TRAINER, "-o", tmp_path / "model")
    looks = iter([{"a": (1, 2, 2**63)}, {"a": (2, 3, 2**63)}])
    monkeypatch.setattr("ckpt.runs.foreign.liveness.look", lambda path: next(looks))
    with pytest.raises(CheckpointError, match="is being written right now"):
        plan(open_checkpoint(tmp_path / "model"), "org/name", PushOptions())


def test_shards_that_are_made_are_not_what_a_stored_model_sends(tmp_path: Path) -> None:
    run("to-fp32", TRAINER, "-o", tmp_path / "model")
    assert not [item for item in of(tmp_path / "model").items if isinstance(item.source, Shard)]
