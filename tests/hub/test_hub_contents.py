"""What a push publishes: exactly the allow-list, whatever else lies in the folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_folders
from heavy_libraries import peft, transformers
from oracles import FIXTURES, run
from run_folders import commit, real
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from stage0 import save_stage0

from ckpt.hub.content import local_paths
from ckpt.hub.content.contents import contents
from ckpt.hub.content.items import MAX_FILE_BYTES, Contents, Item, require_fitting
from ckpt.hub.content.secrets import secrets
from ckpt.runs.run import RunCheckpoint, open_checkpoint
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.execute.virtual_file import Serving
from converters.plan import Shard

MODEL = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
TRAPS = (
    ".env",
    ".git/config",
    ".gitattributes",
    ".hidden/model.safetensors",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".pinned",
    "adapter_model.safetensors.index.json",
    "chat_template.pkl",
    "events.out.tfevents.1",
    "extra_state_0.state",
    "id_rsa",
    "model-00001-of-00002.safetensors",
    "model-extra.safetensors",
    "model.safetensors.index.json",
    "model.safetensors.partial",
    "notes.md",
    "optimizer.pt",
    "pytorch_model.bin",
    "runs/events.json",
    "secrets.json",
    "tokenizer.json.bak",
    "tokenizer\x07.json",
    "tokenizer\\..\\x.json",
    "train.py",
    "vocab.pt",
    "wandb/config.json",
    "zero_to_fp32.py",
    "..tokenizer.json",
)


def sent(
    checkpoint: RunCheckpoint, dtype: str = "fp32", max_shard_size: int = 1 << 40, **options: Any
) -> Contents:
    return contents(checkpoint, dtype=dtype, max_shard_size=max_shard_size, **options)


def names(found: Contents) -> set[str]:
    return {item.name for item in found.items}


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def configured(folder: Path, **changes: object) -> RunCheckpoint:
    """The checkpoint committed with another config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return commit(folder, 500, {"eval_loss": 1.5})


@pytest.fixture
def checkpoint(tmp_path: Path) -> RunCheckpoint:
    return real(tmp_path / "out", 500, {"eval_loss": 1.5})


@pytest.mark.parametrize("committed", [True, False])
def test_nothing_outside_the_allow_list_is_ever_sent(
    committed: bool, checkpoint: RunCheckpoint
) -> None:
    folder = checkpoint.folder
    for trap in TRAPS:
        (folder / trap).parent.mkdir(exist_ok=True)
        (folder / trap).write_text("{}")
    (folder.parent / "outside.md").write_text("{}")
    (folder / "LICENSE.md").symlink_to("../outside.md")
    (folder / "LICENSE").symlink_to("/etc/passwd")
    (folder / "added_tokens.json").symlink_to("nowhere")
    os.mkfifo(folder / "special_tokens_map.json")
    if committed:  # what the manifest lists is no reason to publish it
        checkpoint = commit(folder, 500)
    found = sent(checkpoint)
    assert names(found) == MODEL | TOKENIZER
    told = dict(found.left_out)
    assert told["LICENSE.md"] == told["LICENSE"] == "a link that leaves the folder"
    assert told["added_tokens.json"] == "a link that leads nowhere"
    for name in ("training_args.bin", "scheduler.pt", "rng_state_0.pth", "global_step2", "latest"):
        assert told[name]
    there = {path.name for path in folder.iterdir()}
    assert there == set(told) | names(found) - {"README.md"}  # nothing is passed over in silence


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.json"])
def test_nothing_is_sent_where_the_reader_needs_what_a_link_out_of_the_folder_leads_to(
    name: str, committed: bool, checkpoint: RunCheckpoint, tmp_path: Path
) -> None:
    path = checkpoint.folder / name
    path.unlink(missing_ok=True)
    (tmp_path / "outside").write_text("{}")
    path.symlink_to(tmp_path / "outside")
    if not committed:
        (checkpoint.folder / "manifest.json").unlink()
        checkpoint = open_checkpoint(checkpoint.folder)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be sent: a link .* cp -rL .*-copy"):
        sent(checkpoint)


def test_a_snapshot_of_the_hubs_cache_is_sent_by_its_links(
    checkpoint: RunCheckpoint, tmp_path: Path
) -> None:
    """They lead to blobs of their own repository; to those of another one is out of the folder."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    names_sent = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in names_sent:
        (repository / "blobs" / f"hash-{name}").write_bytes((checkpoint.folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert {*names_sent} <= names(sent(open_checkpoint(snapshot), dtype="keep"))

    other = tmp_path / "models--org--other" / "blobs"
    (repository / "blobs").rename(tmp_path / "blobs")
    other.parent.mkdir()
    (tmp_path / "blobs").rename(other)
    for name in names_sent:
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(other / f"hash-{name}")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        sent(open_checkpoint(snapshot), dtype="keep")


def test_the_weights_are_those_of_the_states_and_the_config_says_their_type(
    checkpoint: RunCheckpoint,
) -> None:
    found = sent(checkpoint, "bf16", 4000)
    shards = [item for item in found.items if isinstance(item.source, Shard)]
    assert len(shards) > 1 and all(item.nbytes <= 6000 for item in shards)
    held = {item.name: item.source for item in found.items}
    index, config = held["model.safetensors.index.json"], held["config.json"]
    assert isinstance(index, bytes) and isinstance(config, bytes)
    assert set(json.loads(index)["weight_map"].values()) == {item.name for item in shards}
    assert json.loads(config)["dtype"] == "bfloat16"
    assert found.conversion is not None and found.facts["dtype"] == "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert found.facts["parameters"] == model.num_parameters()
    assert found.facts["metrics"] == {"eval_loss": 1.5} and found.facts["step"] == 500


def test_code_is_sent_that_auto_map_names_and_what_it_imports(checkpoint: RunCheckpoint) -> None:
    folder = checkpoint.folder
    configured(folder, auto_map={"AutoModel": "modeling_x.X", "AutoConfig": "org/r--conf.C"})
    put(folder, modeling_x__py="import torch\nfrom .layers import A\nif 1:\n from . import rope\n")
    put(folder, layers__py="from .modeling_x import X", rope__py="", conf__py="", other__py="")
    put(folder, tokenizing__py="def broken(:")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "tokenizing.T"]}})
    )
    found = sent(commit(folder, 500))
    code = {name for name in names(found) if name.endswith(".py")}
    assert code == {"modeling_x.py", "layers.py", "rope.py", "tokenizing.py"}
    assert dict(found.left_out)["conf.py"] == "code that no auto_map names"
    assert any("tokenizing.py is not Python" in line for line in found.warnings)


@pytest.mark.parametrize("module", ["gone", "../../etc/x", "a.b", "linked"])
def test_code_that_is_not_there_is_said(module: str, checkpoint: RunCheckpoint) -> None:
    (checkpoint.folder / "linked.py").symlink_to("../../elsewhere.py")
    (checkpoint.folder.parent.parent / "elsewhere.py").write_text("")
    found = sent(configured(checkpoint.folder, auto_map={"AutoModel": f"{module}.X"}))
    assert not [name for name in names(found) if name.endswith(".py")]
    assert any("auto_map of config.json names" in line for line in found.warnings)


def test_a_config_that_is_a_link_to_elsewhere_is_refused(checkpoint: RunCheckpoint) -> None:
    config = checkpoint.folder / "config.json"
    shutil.move(config, checkpoint.folder.parent / "config.json")
    config.symlink_to("../config.json")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be sent: a link that leaves"):
        sent(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_that_was_changed_after_the_commit_is_not_sent(
    name: str, checkpoint: RunCheckpoint
) -> None:
    data = bytearray((checkpoint.folder / name).read_bytes())
    data[data.index(b":") + 1 : data.index(b":") + 2] = b"\t"  # JSON as before, and as long
    (checkpoint.folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: .* is not what was committed"):
        for item in sent(checkpoint).items:
            item.require_whole()


def test_a_card_that_is_there_is_sent_as_it_is(checkpoint: RunCheckpoint) -> None:
    put(checkpoint.folder, README__md="# mine", LICENSE="MIT", LICENSE__txt="MIT")
    found = sent(checkpoint)
    assert {"README.md", "LICENSE", "LICENSE.txt"} <= names(found) and not found.made_names
    assert {i.name: i.source for i in found.items}["README.md"] == checkpoint.folder / "README.md"
    assert "README.md" not in names(sent(real(checkpoint.folder.parent, 2), card=False))


def test_of_an_adapter_its_own_files_are_sent(checkpoint: RunCheckpoint, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.name_or_path = "org/base"
    peft.get_peft_model(model, config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        shutil.copy(tmp_path / "adapter" / name, checkpoint.folder)
    found = sent(commit(checkpoint.folder, 500), "bf16")
    assert names(found) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "config.json",
        "generation_config.json",
        *TOKENIZER,
    }
    assert found.conversion is None and found.facts["kind"] == "adapter"
    assert found.facts["base_model"] == "org/base" and found.facts["library_name"] == "peft"
    held = next(item for item in found.items if item.name == "adapter_model.safetensors")
    held.require_whole()
    assert any("in F32, not as bf16" in line for line in found.warnings)
    with pytest.raises(CheckpointError, match="the manifest does not list it"):
        sent(replace(checkpoint, manifest=checkpoint.manifest))  # of before the adapter was there


def test_an_adapter_without_elements_is_refused(checkpoint: RunCheckpoint) -> None:
    """ZeRO-3 leaves such files where the weights were not gathered; one was published."""
    (checkpoint.folder / "adapter_config.json").write_text("{}")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(0)}, checkpoint.folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensor without elements") as error:
        sent(commit(checkpoint.folder, 500), "keep")
    assert error.value.kind == "unloadable"


@pytest.fixture
def weights(tmp_path: Path) -> RunCheckpoint:
    """Tier weights: a converted model in two shards, committed."""
    folder = tmp_path / "out/weights-7"
    options = ("--dtype", "bf16", "--max-shard-size", "8KB")
    run("to-fp32", FIXTURES / "trainer-zero3/checkpoint-2", "-o", folder, *options)
    put(folder, model_extra__safetensors="x", training_args__bin="x", conversion__json="{}")
    return commit(folder, 7, tier="weights")


def test_weights_alone_are_sent_as_they_are(weights: RunCheckpoint) -> None:
    found = sent(weights, "bf16")
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    model = (MODEL - {"model.safetensors"}) | {"model.safetensors.index.json"}
    assert names(found) == shards | model | TOKENIZER
    assert found.facts["kind"] == "weights" and found.facts["dtype"] == "bf16"
    held = 0
    for name in shards:
        with safe_open(weights.folder / name, "pt") as file:
            held += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert found.facts["parameters"] == held
    assert names(sent(weights, "keep")) == names(found)
    with pytest.raises(CheckpointError, match=r"holds BF16 weights .* --dtype keep"):
        sent(weights, "fp32")


def test_a_model_that_from_pretrained_refuses_is_not_published(checkpoint: RunCheckpoint) -> None:
    resized = configured(checkpoint.folder, vocab_size=3)
    with pytest.raises(CheckpointError, match=r"config.json says vocab_size 3.*--check none"):
        sent(resized)
    assert sent(resized, request=Request(check="none")).conversion is not None


def test_an_index_cannot_smuggle_files_in(weights: RunCheckpoint) -> None:
    index = weights.folder / "model.safetensors.index.json"
    whole = index.read_text()
    for name, why in (
        ("training_args.bin", "not a safetensors file"),
        ("../../x.safetensors", "outside its folder"),
        ("gone.safetensors", "it is missing"),
    ):
        index.write_text(whole.replace("model-00002-of-00002.safetensors", name))
        with pytest.raises(CheckpointError, match=why):
            sent(weights, "bf16")
    shutil.copy(
        weights.folder / "model-00002-of-00002.safetensors", weights.folder / "new.safetensors"
    )
    index.write_text(whole.replace("model-00002-of-00002.safetensors", "new.safetensors"))
    with pytest.raises(CheckpointError, match="the manifest does not list it"):
        sent(weights, "bf16")


def test_the_training_state_is_what_the_manifest_lists(checkpoint: RunCheckpoint) -> None:
    put(checkpoint.folder, later__json="{}")
    (checkpoint.folder / ".pinned").touch()
    found = sent(checkpoint, training_state=True)
    assert checkpoint.manifest is not None
    assert names(found) == {*checkpoint.manifest.files, "manifest.json"}
    assert any(name.endswith("optim_states.pt") for name in names(found))
    assert {name for name, _ in found.left_out} == {"later.json", ".pinned"}
    assert found.conversion is None and not found.made_names
    for item in found.items:
        item.require_whole()
    path = checkpoint.folder / "trainer_state.json"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was committed"):
        next(item for item in found.items if item.source == path).require_whole()


def test_training_state_that_would_not_be_whole_is_refused(
    checkpoint: RunCheckpoint, weights: RunCheckpoint, tmp_path: Path
) -> None:
    (checkpoint.folder / "manifest.json").unlink()
    (tmp_path / "elsewhere").write_text("x")
    linked = real(tmp_path / "linked", 1)
    (linked.folder / "extra.json").symlink_to(tmp_path / "elsewhere")
    named = real(tmp_path / "named", 1)
    (named.folder / ".github").write_text("x")
    part = real(tmp_path / "part", 1)
    for bad, why in (
        (open_checkpoint(checkpoint.folder), "has no manifest.json"),
        (weights, "is of weights alone"),
        (commit(linked.folder, 1), "a link that leaves the folder"),
        (commit(named.folder, 1), "git's or the Hub client's own"),
        (commit(part.folder, 1, nodes=2), "ckpt collect"),
    ):
        with pytest.raises(CheckpointError, match=why):
            sent(bad, training_state=True)


@pytest.mark.parametrize(
    "name",
    (
        *("", "/x", "../x", "a/../b", "a//b", "./a", "a\\b", "a\nb", "a\0", "\ud800", "a" * 256),
        *(" a", ".git/x", "a/.gitignore", ".GIT/x", "a/.cache/x"),
    ),
)
def test_a_name_that_could_leave_the_repository_is_no_item(name: str) -> None:
    with pytest.raises(ValueError):
        Item(name, b"")


CARD_OF_PEFT = """---
base_model: /home/me/llama
library_name: peft
tags:
- base_model:adapter:/home/me/llama
- lora
---

# mine

Fine-tuned from [/home/me/llama](https://huggingface.co//home/me/llama).
"""


def test_a_path_of_this_machine_is_left_out_of_what_is_sent(checkpoint: RunCheckpoint) -> None:
    put(checkpoint.folder, README__md=CARD_OF_PEFT)
    found = sent(configured(checkpoint.folder, _name_or_path="/home/me/llama"))
    texts = {i.name: i.source for i in found.items if isinstance(i.source, bytes)}
    card = texts["README.md"].decode()
    head = "---\nlibrary_name: peft\ntags:\n- lora\n---\n"
    assert card == head + "\n# mine\n\nFine-tuned from llama.\n"
    assert "_name_or_path" not in json.loads(texts["config.json"])
    assert all(b"/home/me" not in text for text in texts.values())
    assert len(found.warnings) == 2 and all("left out of what" in line for line in found.warnings)
    assert (checkpoint.folder / "README.md").read_text() == CARD_OF_PEFT


@pytest.mark.parametrize(
    ("metadata", "left"),
    [
        ("base_model:\n- /a/b\n- org/c\nx: y\n", "base_model:\n- org/c\nx: y\n"),
        ("base_model:\n  - '/a/b'\nx: y\n", "x: y\n"),
        ('base_model: "C:\\a b"\nx: y\n', "x: y\n"),
        ("base_model: here/base\nx: y\n", "x: y\n"),
        ("base_model: org/c\nx: /a/b\n", None),
        ("x: y\n", None),
    ],
)
def test_a_cards_base_model_is_a_name_of_the_hub(
    metadata: str, left: str | None, tmp_path: Path
) -> None:
    (tmp_path / "here/base").mkdir(parents=True)
    items = [Item("README.md", f"---\n{metadata}---\n".encode())]
    (item,) = local_paths.without_paths(items, tmp_path).items
    assert item == items[0] if left is None else item.source == f"---\n{left}---\n".encode()


def test_an_adapters_configuration_names_no_path(tmp_path: Path) -> None:
    text = json.dumps({"base_model_name_or_path": "/home/me/llama", "r": 4}).encode()
    (item,) = local_paths.without_paths([Item("second/adapter_config.json", text)], tmp_path).items
    assert isinstance(item.source, bytes)
    assert json.loads(item.source) == {"base_model_name_or_path": None, "r": 4}


def test_the_limits_of_the_hub_are_met_before_the_first_byte(tmp_path: Path) -> None:
    large = tmp_path / "model.safetensors"
    with open(large, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 50,000,000,001 bytes.*5GB"):
        require_fitting([Item("model.safetensors", large)])
    with pytest.raises(CheckpointError, match=r"10,001 files.*--max-shard-size"):
        require_fitting([Item(f"a/{number}", b"") for number in range(10_001)])
    with pytest.raises(CheckpointError, match="twice"):
        require_fitting([Item("a", b"x"), Item("a", b"y")])


SECRETS = {  # put together here, so that no scanner takes this file for a leak
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an AWS access key": "AKIA" + "ABCDEFGH23456789",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an API key (sk-)": "sk-" + "proj-Ab1" * 5,
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "a Weights & Biases key": 'WANDB_API_KEY="' + "0123456789abcdef" * 2 + '01234567"',
    "a password in an address": "https://me:" + "s3cret@example.org/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_warned_of_by_file_and_line_and_never_shown(
    kind: str, checkpoint: RunCheckpoint
) -> None:
    folder = checkpoint.folder
    checkpoint = configured(folder, auto_map={"AutoModel": "modeling_x.X"})
    put(folder, modeling_x__py=f"import os\n\nx = '''{SECRETS[kind]}'''\n")
    found = sent(checkpoint)
    assert [f"{folder / 'modeling_x.py'}, line 3: looks like {kind}; remove it and revoke it"] == [
        line for line in found.warnings if "looks like" in line
    ]
    assert SECRETS[kind] not in repr((found.warnings, found.facts, found.left_out))
    checkpoint = configured(folder, comment=SECRETS[kind])
    assert len([line for line in sent(checkpoint).warnings if kind in line]) == 2


def test_ordinary_text_is_no_secret() -> None:
    texts = [
        "see https://user@example.org/x:y@z, http://example.org:8080/a@b, sk-learn-like-pipelines",
        "commit 0123456789abcdef0123456789abcdef01234567, hf_hub_download, hf_transfer, AKIAsaki",
        "f'https://{user}:{password}@host', 'https://$USER:$PASSWORD@host', -----BEGIN PUBLIC KEY",
        "task-oriented-dialogue-systems-2024-with-long-names wandb run 12 key results",
    ]
    for text in texts:
        assert list(secrets(text.encode())) == [], text
    for path in (*FIXTURES.rglob("*.json"), *FIXTURES.rglob("*.md")):
        assert list(secrets(path.read_bytes())) == [], path


def test_a_path_of_this_machine_is_warned_of(checkpoint: RunCheckpoint) -> None:
    assert sent(checkpoint).warnings == ()
    (line,) = sent(configured(checkpoint.folder, _name_or_path="/home/me/llama")).warnings
    assert "_name_or_path is a path of this machine" in line
    checkpoint = configured(checkpoint.folder, _name_or_path="org/llama")
    assert sent(checkpoint).warnings == ()
    put(checkpoint.folder, README__md="---\nbase_model: /home/me/llama\n---\n")  # as PEFT writes it
    (line,) = sent(checkpoint).warnings
    assert "README.md: base_model is a path of this machine" in line


def test_a_push_takes_the_tokenizer_from_where_the_user_says(
    checkpoint: RunCheckpoint, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    put(elsewhere, bpe__codes="x", vocab__txt="x", tokenizer_config__json="{}")
    found = sent(checkpoint, request=Request(tokenizer=elsewhere))
    assert names(found) == MODEL | {"bpe.codes", "vocab.txt", "tokenizer_config.json"}
    assert {item.name: item.source for item in found.items}["vocab.txt"] == elsewhere / "vocab.txt"
    assert dict(found.left_out)["tokenizer.json"] == "not among what the conversion writes"

    (elsewhere / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be sent: a link that leaves"):
        sent(checkpoint, request=Request(tokenizer=elsewhere))


def test_the_modules_of_a_sentence_model_are_sent_in_their_folders(tmp_path: Path) -> None:
    from test_sentence_transformers import BERT, DENSE, put_surroundings

    values = {f"0.model.{name}": value for name, value in BERT.items()}
    root = save_stage0(tmp_path / "c", values | {f"2.{n}": value for n, value in DENSE.items()})
    put_surroundings(root)
    found = sent(open_checkpoint(root), card=False, request=Request(check="none"))
    assert names(found) == {
        *("model.safetensors", "2_Dense/model.safetensors", "config.json", "modules.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer.json"),
        *("1_Pooling/config.json", "2_Dense/config.json"),
    }


@pytest.mark.parametrize("layout", ["hub", "runtime"])
def test_what_is_sent_has_the_layout_that_is_asked_for(layout: Any, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2},
    )
    model = transformers.MixtralForCausalLM(config)
    checkpoint = tmp_path / "checkpoint"
    zero_folders.save(model, checkpoint)
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "expected", save_original_format=layout == "hub")

    options = {} if layout == "hub" else {"request": Request(layout=layout)}
    found = sent(open_checkpoint(checkpoint), **options)

    assert found.conversion is not None
    serving = Serving(found.conversion.plan)
    served = [serving.open(item.source) for item in found.items if isinstance(item.source, Shard)]
    tensors = [load(file.read()) for file in served]
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert len(tensors) == 1 and tensors[0].keys() == expected.keys()
    assert all(torch.equal(tensors[0][name], value) for name, value in expected.items())
