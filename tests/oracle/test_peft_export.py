"""The names and tensors that PEFT saves, by our rules, against the installed PEFT."""

from __future__ import annotations

from pathlib import Path

import peft_models
import pytest
import torch
from safetensors.torch import load_file

from converters.peft import config as configs
from converters.peft import export, names


@pytest.mark.parametrize("kind", peft_models.KINDS)
def test_the_names_of_each_kind_are_those_that_peft_saves(kind: str, tmp_path: Path) -> None:
    model = peft_models.model(kind)
    folder = peft_models.saved(model, tmp_path)
    stored = load_file(folder / "adapter_model.safetensors")
    config = configs.read(folder)
    state = model.state_dict()

    seen: set[int] = set()
    tied = [
        n for n, value in state.items() if value.data_ptr() in seen or seen.add(value.data_ptr())
    ]

    chosen = export.selection(state, config, tied=tied)

    assert set(chosen.sources) == set(stored)
    for name, source in chosen.sources.items():
        if not chosen.prompt:
            assert torch.equal(state[source], stored[name]), name


@pytest.mark.parametrize(
    "name",
    [
        "prompt_encoder.point_embed.0.weight",  # SAM
        "prompt_encoder.mask_embed.conv1.weight",
        "model.q_proj.lora_A",  # loralib
        "model.q_proj.lora_A.weight",
        "model.q_proj.lora_up.weight",  # kohya
        "model.q_proj.lora_layer.down.weight",  # diffusers
        "road_encoder.layers.0.weight",
        "lora_A",
    ],
)
def test_names_of_other_models_are_no_adapters(name: str) -> None:
    assert not names.adapters([name, "lm_head.weight"])


def test_a_name_is_taken_apart() -> None:
    lora = names.parsed("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    parts = (lora.prefix, lora.module, lora.role, lora.adapter, lora.rest, lora.original)
    module = "model.layers.0.q_proj"
    assert parts == ("base_model.model.", module, "lora_A", "default", "weight", module)
    codes = names.parsed("base_model.model.q.base_layer.weight.absmax")
    assert codes.original == "q.weight.absmax" and codes.adapter is None
    saved = names.parsed("base_model.model.score.modules_to_save.x.weight")
    assert (saved.original, saved.adapter) == ("score.weight", "x")
    for name in ("weight", "original_module", "modules_to_save", "lora_B", "token_adapter"):
        lora = names.parsed(f"base_model.model.q.lora_A.{name}.weight")
        assert (lora.role, lora.adapter, lora.rest) == ("lora_A", name, "weight")
        rows = names.parsed(f"base_model.model.e.lora_embedding_A.{name}")
        assert (rows.role, rows.adapter, rows.rest) == ("lora_embedding_A", name, "")
    assert names.parsed("q.lora_A.weight").adapter is None
    outer = names.parsed("pretrained_model.prompt_encoder.default.embedding.weight")
    assert (outer.prefix, outer.role, outer.adapter) == (
        "pretrained_model.",
        "prompt_encoder",
        "default",
    )
