"""to-fp32 --merge of checkpoints that have only what was trained, and more than an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
import zero_folders
from heavy_libraries import peft, transformers
from safetensors.torch import load_file, save_file
from test_merging import Run

from ckpt.weights.conversion import convert
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = "adapter_model.safetensors"


def unfreeze(model: Any) -> None:
    inner = model.base_model.model.model
    for value in (inner.norm.weight, inner.embed_tokens.weight):
        value.requires_grad_(True)
        with torch.no_grad():
            value.add_(torch.randn_like(value))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trained_parameters_outside_of_the_adapter_win_over_the_base(
    stage: int, tmp_path: Path
) -> None:
    run = Run("lora", tmp_path, stage, exclude_frozen=True, edit=unfreeze)
    tensors = load_file(run.base / "model.safetensors")
    for name in ("model.norm.weight", EMBEDDING):  # the base is what it was before the training
        tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})

    run.merge(base=run.base)

    run.require_same_logits()


def test_the_head_of_a_class_around_the_model_is_left_out(tmp_path: Path) -> None:
    run = Run("lora", tmp_path / "inner", exclude_frozen=True)
    whole = torch.nn.Module()
    whole.llm, whole.proj = run.model, torch.nn.Linear(4, 4)
    checkpoint = zero_folders.save(whole, tmp_path / "checkpoint-2", exclude_frozen=True)
    config = run.checkpoint / "adapter_config.json"
    (checkpoint / config.name).write_bytes(config.read_bytes())
    run.checkpoint = checkpoint

    facts = run.merge(base=run.base)

    (note,) = [note for note in facts["notes"] if "outside of the PEFT model" in note]
    assert "proj.weight" in note and "proj.bias" in note
    run.require_same_logits()


def test_a_value_head_stays_beside_the_merged_model_and_is_named(tmp_path: Path) -> None:
    run = Run("lora", tmp_path / "inner", exclude_frozen=True)
    whole = torch.nn.Module()
    whole.pretrained_model, whole.v_head = run.model, torch.nn.Linear(4, 1)
    checkpoint = zero_folders.save(whole, tmp_path / "checkpoint-2", exclude_frozen=True)
    config = run.checkpoint / "adapter_config.json"
    (checkpoint / config.name).write_bytes(config.read_bytes())
    run.checkpoint = checkpoint

    facts = run.merge(base=run.base)

    assert any(note.startswith("v_head.* is trl's value head") for note in facts["notes"])
    assert torch.equal(run.tensors()["v_head.weight"], whole.v_head.weight)


def shrink(run: Run, rows: int = 30) -> dict[str, torch.Tensor]:
    """The base as it was before the vocabulary was resized; returns the trained embeddings."""
    path = run.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}))
    tensors = load_file(run.base / "model.safetensors")
    whole = {name: tensors[name] for name in (EMBEDDING, HEAD) if name in tensors}
    small = {name: value[:rows].clone() for name, value in whole.items()}
    save_file(tensors | small, run.base / "model.safetensors", {"format": "pt"})
    return whole


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resized_vocabulary_is_taken_from_the_adapters_file(stage: int, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, stage, exclude_frozen=True)
    whole = shrink(run)
    stored = {f"base_model.model.{name}": value for name, value in whole.items()}
    save_file(stored, run.checkpoint / STORED)

    facts = run.merge(base=run.base)

    assert any("taken from the adapter's own file" in note for note in facts["notes"])
    assert any("vocab_size is 40" in note for note in facts["notes"])
    run.require_same_logits()


def tie(model: Any) -> None:
    """A tied model whose adapter changes no embedding."""
    inner = model.base_model.model
    inner.lm_head.weight = inner.model.embed_tokens.weight
    inner.config.tie_word_embeddings = True


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resized_vocabulary_stays_tied(stage: int, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, stage, exclude_frozen=True, edit=tie)
    whole = shrink(run)[EMBEDDING]
    stored = {f"base_model.model.{name}": whole.clone() for name in (EMBEDDING, HEAD)}
    save_file(stored, run.checkpoint / STORED)

    run.merge(base=run.base)

    assert HEAD not in run.tensors()
    assert run.tensors()[EMBEDDING].shape == whole.shape
    run.require_same_logits()


def test_a_resized_vocabulary_that_is_lost_is_said(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, 3, exclude_frozen=True)
    shrink(run)
    stored = {f"base_model.model.{name}": torch.empty(0) for name in (EMBEDDING, HEAD)}
    save_file(stored, run.checkpoint / STORED)
    with pytest.raises(CheckpointError, match="the resized embeddings are lost"):
        run.merge(base=run.base)


def test_trained_rows_beyond_the_base_say_that_it_was_resized(tmp_path: Path) -> None:
    run = Run("tokens", tmp_path, exclude_frozen=True)
    shrink(run, 4)
    with pytest.raises(CheckpointError, match=r"vocabulary was resized .* with base="):
        run.merge(base=run.base)


def test_without_zero_the_trained_adapters_are_asked_for(tmp_path: Path) -> None:
    other = peft_models._lora(r=2, target_modules=["q_proj", "v_proj"])
    run = Run("lora", tmp_path, reference=other)
    for path in run.checkpoint.rglob("*"):
        if path.name.endswith("optim_states.pt"):
            path.unlink()
    (path,) = run.checkpoint.rglob("mp_rank_00_model_states.pt")
    state = torch.load(path, weights_only=False)
    state["module"] = {name: value.clone() for name, value in run.model.state_dict().items()}
    state |= {"ds_config": {}, "param_shapes": None, "frozen_param_shapes": None}
    torch.save(state, path)

    with pytest.raises(CheckpointError, match='which of them were trained; part="default"'):
        run.merge(config=run.base)
    request = Request(merge=True, config=run.base, naming=Naming(part="default"))
    convert.run(convert.prepare(run.checkpoint, run.output, request=request))
    run.require_same_logits()


@pytest.mark.parametrize("stage", [2, 3])
def test_names_that_are_tied_to_an_excluded_one_are_not_called_absent(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2
    )
    monkeypatch.setitem(
        peft_models.KINDS,
        "t5",
        (
            lambda: transformers.T5ForConditionalGeneration(config),
            lambda: peft.LoraConfig(target_modules=["q"], init_lora_weights=False),
        ),
    )
    run = Run("t5", tmp_path, stage, exclude_frozen=True)

    facts = run.merge(base=run.base)

    assert not facts["absent"]
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= facts["aliases"].keys()
    assert facts["loads"] and "lm_head.weight" not in run.tensors()
    run.loaded()
