"""Resized vocabularies: PEFT saves the embeddings of those that are the model's own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft_models
import pytest
import zero_folders
from heavy_libraries import peft, transformers

from ckpt.weights.conversion import convert
from ckpt.weights.request import Request


def llava(tied: bool) -> Any:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**size, **heads, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(
        **size, **heads, num_key_value_heads=2, vocab_size=40, tie_word_embeddings=tied
    )
    parts = {"vision_config": vision, "text_config": text}
    config = transformers.LlavaConfig(**parts, image_token_id=39, tie_word_embeddings=tied)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("exclude_frozen", [True, False])
@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_an_adapter_of_a_vision_model_has_the_names_that_peft_saves(
    saved: list[str] | None, exclude_frozen: bool, tmp_path: Path
) -> None:
    base = llava(tied=True)
    base.save_pretrained(tmp_path / "base")
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(48, mean_resizing=False)
    resized.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved)
    model = peft.get_peft_model(resized, config)
    peft_models.saved(model, tmp_path / "live")
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=exclude_frozen)
    for path in (tmp_path / "live").glob("adapter_*"):
        shutil.copy(path, checkpoint)

    made = convert.prepare(checkpoint, tmp_path / "out", request=Request())
    convert.run(made)

    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "live" / name).read_bytes()
    notes = (*made.product.notes, *made.verdict.notes)
    assert not any("has other names" in note for note in notes)
    assert (saved is None) == any("has 48 rows and the base 40" in note for note in notes)
