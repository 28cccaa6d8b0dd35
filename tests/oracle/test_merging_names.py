"""to-fp32 --merge --base: a base under the Hub's names, which transformers 5 runs under others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from heavy_libraries import transformers
from safetensors.torch import load_file
from test_merging import Run

from ckpt.weights.adapters import base_names
from ckpt.weights.reader import table
from converters.errors import CheckpointError
from converters.tensors import DType, TensorRef, Weights

TEXT = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
}
VISION = {
    **{"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    "patch_size": 4,
}


def qwen() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=TEXT, vision_config=VISION, tie_word_embeddings=False
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def rules(name: str, config: dict[str, Any]) -> dict[str, str] | None:
    reader = table.reader_of(name)
    assert reader is not None
    hub, memory = (base_names._names(reader, tree, config) for tree in (reader.hub, reader.memory))
    return base_names.prefixes(hub, memory)


def test_a_base_with_other_prefixes_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft_models._lora(target_modules=["q_proj", "v_proj"])
    monkeypatch.setitem(peft_models.KINDS, "qwen", (qwen, lambda: config))
    run = Run("qwen", tmp_path, exclude_frozen=True)
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(run.base / "model.safetensors")

    facts = run.merge(base=run.base)

    assert facts["loads"]
    base_tensors = load_file(run.base / "model.safetensors")
    assert run.tensors().keys() == base_tensors.keys()  # as save_pretrained writes them
    run.require_same_logits()


def test_prefixes_are_told_by_the_table_of_classes() -> None:
    assert rules("LlavaForConditionalGeneration", {}) == {
        "language_model.lm_head.weight": "lm_head.weight",
        "language_model.model.": "model.language_model.",
        "": "model.",
    }
    assert rules("Qwen2VLForConditionalGeneration", {}) == {
        "lm_head.weight": "lm_head.weight",
        "model.": "model.language_model.",
        "": "model.",
    }
    assert rules("ViTForImageClassification", {}) is None


def test_prefixes_that_are_not_clear_are_none() -> None:
    assert base_names.prefixes(["a.x.w"], ["b.x.w", "c.x.w"]) is None
    assert base_names.prefixes(["a.x.w", "b.y.w"], ["c.x.w"]) is None
    assert base_names.prefixes(["a.x.w", "b.x.w"], ["a.x.w", "b.x.w"]) == {"": ""}


def test_names_that_differ_otherwise_are_an_error_that_says_so(tmp_path: Path) -> None:
    ref = TensorRef(DType.F32, (0,), ())
    names = table.reader_of("ViTForImageClassification")
    assert names is not None
    config = {"model_type": "vit", "architectures": [names.name], "num_hidden_layers": 1}
    found = Weights(dict.fromkeys(base_names._names(names, names.hub, config), ref))
    wanted = ["vit.layers.0.attention.q_proj.weight"]

    with pytest.raises(CheckpointError, match="differ by more than prefixes") as error:
        base_names.running(found, wanted, config, tmp_path)

    assert error.value.kind == "unsupported"
    assert "state_dict()" in str(error.value)
