"""A transformers model that FSDP2 trained, as accelerate saves it, becomes a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from heavy_libraries import LateModule, peft, transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import ckpt
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.detect import read
from converters.storage import open_files
from converters.tensors import TensorRef

accelerate = LateModule("accelerate")
accelerate_utils = LateModule("accelerate.utils")

FULL = StateDictOptions(full_state_dict=True)
FORMS = ("SHARDED_STATE_DICT", "SHARDED_STATE_DICT without DCP", "FULL_STATE_DICT")


@pytest.fixture
def trained() -> Iterator[tuple[Any, Any]]:
    """A model with tied embeddings and its optimizer, after two steps of a single rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        accelerate.PartialState(cpu=True)  # which accelerate's logger asks for
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
        config = transformers.LlamaConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
        )
        model = transformers.LlamaForCausalLM(config)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            ids = torch.randint(0, 40, (2, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield model, optimizer
    finally:
        accelerate.PartialState._reset_state()
        dist.destroy_process_group()


def save(form: str, model: Any, optimizer: Any, folder: Path) -> Path:
    """What accelerate writes; the Trainer adds the configuration."""
    state_dict_type, _, without_dcp = form.partition(" ")
    plugin = accelerate_utils.FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=state_dict_type
    )
    accelerator = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    options = {"use_dcp": not without_dcp}
    accelerate_utils.fsdp_utils.save_fsdp_model(plugin, accelerator, model, folder, **options)
    accelerate_utils.fsdp_utils.save_fsdp_optimizer(
        plugin, accelerator, optimizer, model, folder, **options
    )
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_fsdp_trained_is_loaded_by_transformers(
    form: str, trained: tuple[Any, Any], tmp_path: Path
) -> None:
    model, optimizer = trained
    folder = save(form, model, optimizer, tmp_path / "checkpoint-2")
    expected = get_model_state_dict(model, options=FULL)

    converted = ckpt.to_fp32(folder)
    assert converted.record.loads is True, converted.verdict
    loaded = transformers.AutoModelForCausalLM.from_pretrained(converted.path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert converted.record.aliases == {"lm_head.weight": "model.embed_tokens.weight"}

    half = ckpt.to_fp32(folder, tmp_path / "half", dtype="bf16")
    with ckpt.open(half) as weights:
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(weights[name], expected[name].bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_has_the_states_that_torch_returns(
    form: str, trained: tuple[Any, Any], tmp_path: Path
) -> None:
    model, optimizer = trained
    source = read(save(form, model, optimizer, tmp_path / "checkpoint-2"), complete=True)
    assert isinstance(source, ShardedCheckpoint) and source.optimizer and source.groups
    states = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert source.weights.trained == states["state"].keys()
    for name, state in states["state"].items():
        found = source.optimizer(name)
        assert found.keys() == state.keys() and found["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(value(found[key]), state[key])

    (group,) = source.groups()
    assert group.options["lr"] == 0.01 and set(group.names) <= source.weights.trained


def value(ref: Any) -> torch.Tensor:
    assert isinstance(ref, TensorRef)
    data = bytearray(ref.nbytes)
    open_files.read_extents(memoryview(data), ref.extents)
    return torch.frombuffer(data, dtype=torch.float32).reshape(ref.shape)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_an_adapter_that_fsdp_trained_is_what_peft_saves(
    with_optimizer: bool, tmp_path: Path
) -> None:
    """Accelerate saves the shards of an adapter under the names that PEFT saves."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    )
    base.save_pretrained(tmp_path / "base")
    modules = ["lm_head"] if with_optimizer else None  # which the weights alone do not tell
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
    model = peft.get_peft_model(base, settings)
    settings.base_model_name_or_path = str(tmp_path / "base")
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, 40, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

    folder, expected = tmp_path / "checkpoint-1", peft.get_peft_model_state_dict(model)
    dcp.save({"model": expected}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    settings.save_pretrained(folder)
    if with_optimizer:
        states = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(states, checkpoint_id=folder / "optimizer_0", no_dist=True)

    converted = ckpt.to_fp32(folder)
    assert converted.record.kind == "adapter"
    with ckpt.open(converted) as weights:
        assert set(weights) == set(expected)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    if with_optimizer:
        source = read(folder)
        assert source.weights.trained == source.weights.tensors.keys()


def test_ties_of_frozen_weights_are_those_of_the_class(tmp_path: Path) -> None:
    """The optimizer knows none of both names."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config)
    states = {"model.norm.weight": {"exp_avg": torch.ones(16)}}
    state = {"model": model.state_dict(), "optimizer": {"state": states}}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    config.save_pretrained(tmp_path / "step-1")

    converted = ckpt.to_fp32(tmp_path / "step-1")
    assert converted.record.loads is True
    assert converted.record.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
