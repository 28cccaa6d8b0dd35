"""to-fp32 --merge of layers whose weights are (in, out): the class decides, as in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft_models
import pytest
from test_merging import Run

from ckpt.weights.merge import conv1d


@pytest.mark.parametrize("kind", ["gpt2", "unknown"])
def test_a_square_weight_lies_as_the_class_has_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft_models._lora(target_modules=["attn.c_proj"], fan_in_fan_out=True)
    monkeypatch.setitem(peft_models.KINDS, "square", (peft_models.gpt2, lambda: config))
    run = Run("square", tmp_path)
    path = run.checkpoint / "adapter_config.json"
    stated = json.loads(path.read_text()) | {"fan_in_fan_out": kind == "unknown"}
    path.write_text(json.dumps(stated))  # by hand: PEFT sets it by the class
    if kind == "unknown":
        content = json.loads((run.base / "config.json").read_text()) | {"model_type": "mine"}
        (run.base / "config.json").write_text(json.dumps(content))

    facts = run.merge(config=run.base, check="none")

    asked = [note for note in facts["notes"] if "is square" in note]
    assert len(asked) == (kind == "unknown")
    assert all("taken as (in, out)" in note for note in asked)
    (run.output / "config.json").write_text(
        (run.output / "config.json").read_text().replace('"mine"', '"gpt2"')
    )
    run.require_same_logits()


def test_models_within_models_have_such_layers_too() -> None:
    decoder = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    assert conv1d.transposed(decoder)("decoder.transformer.h.0.attn.c_proj") is True
    assert conv1d.transposed({"model_type": "gpt2"})("lm_head") is False
    assert conv1d.transposed({"model_type": "gpt_bigcode"})("transformer.h.0.attn.c_proj") is False
    assert conv1d.transposed({"model_type": "gpt2", "auto_map": {"a": "b"}})("c_proj") is None
    assert conv1d.transposed(None)("c_proj") is None
