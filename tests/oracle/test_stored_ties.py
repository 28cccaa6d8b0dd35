"""Tied weights in files of weights: what is published has the names of ``save_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from heavy_libraries import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt.hub.content.contents import contents
from ckpt.runs.run import open_checkpoint
from ckpt.weights.check import stored
from ckpt.weights.conversion import convert
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError
from converters.formats import safetensors

State = Mapping[str, torch.Tensor]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}


@cache
def model_of(kind: str) -> transformers.PreTrainedModel:
    config: transformers.PretrainedConfig
    if kind == "t5":
        config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "bert":
        config = transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=8)
        return transformers.BertForMaskedLM(config)

    config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def one_file(state: State, folder: Path) -> None:
    torch.save(dict(state), folder / "pytorch_model.bin")


def copies(state: State, folder: Path) -> None:
    one_file({name: tensor.clone() for name, tensor in state.items()}, folder)


def backwards(state: State, folder: Path) -> None:
    one_file(dict(reversed(state.items())), folder)


def shards(state: State, folder: Path) -> None:
    names, weight_map = list(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("write", [one_file, copies, backwards, shards])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_pickled_model_is_published_under_the_names_of_save_pretrained(
    kind: str, write: Callable[[State, Path], None], tmp_path: Path
) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as theirs:
        names = set(theirs.keys())
    (tmp_path / "model.safetensors").unlink()
    write(model.state_dict(), tmp_path)
    conversion = convert.plan_stored(tmp_path)
    assert {p.name for shard in conversion.plan.shards for p in shard.placements} == names
    assert not any("untie" in note or "of its own" in note for note in conversion.notes)


def test_a_head_with_other_values_is_published_and_told(tmp_path: Path) -> None:
    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][-1, -1] += 1
    one_file(state, tmp_path)
    conversion = convert.plan_stored(tmp_path)
    names = {p.name for shard in conversion.plan.shards for p in shard.placements}
    assert names == set(state)
    assert any("lm_head.weight" in note and "--untie" in note for note in conversion.notes)


def test_equal_values_under_two_names_of_safetensors_need_no_note(tmp_path: Path) -> None:
    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    verdict = stored.require_model(
        tmp_path, safetensors.read(tmp_path / "model.safetensors").tensors
    )
    assert verdict.loads and verdict.notes == ()
    published = contents(open_checkpoint(tmp_path), max_shard_size=1 << 40)
    assert not any("untie" in line for line in published.warnings)


def test_stored_weights_are_published_untied_where_that_is_asked_for(tmp_path: Path) -> None:
    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    told = contents(checkpoint, max_shard_size=1 << 40)
    assert any("--untie writes tie_word_embeddings: false" in line for line in told.warnings)
    untied = contents(checkpoint, max_shard_size=1 << 40, request=Request(untie=True))
    assert not any("untie" in line for line in untied.warnings)
    sources = {item.name: item.source for item in untied.items}
    config = json.loads(bytes(sources["config.json"]))  # type: ignore[arg-type]
    original = json.loads((tmp_path / "config.json").read_text())
    assert config == original | {"tie_word_embeddings": False}
    request = Request(naming=Naming.of(strip="model."))
    with pytest.raises(CheckpointError, match=r"--strip does not go with .* sent as they lie"):
        contents(checkpoint, max_shard_size=1 << 40, request=request)
