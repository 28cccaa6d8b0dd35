"""to-fp32 --merge: the base that an adapter's configuration names, or that is amiss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heavy_libraries import transformers
from test_merging import Run

from converters.errors import CheckpointError

STATE = "mp_rank_00_model_states.pt"
CONSTANTS = {  # of bitsandbytes, by the end of their names: what is saved where codes are excluded
    "4 bit": {
        "weight.absmax": torch.ones(4),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(24, dtype=torch.uint8),
    },
    "8 bit": {"SCB": torch.ones(16), "weight_format": torch.tensor(0, dtype=torch.uint8)},
}


def name_base(run: Run, base: str) -> None:
    path = run.checkpoint / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("bits", CONSTANTS)
def test_constants_of_a_quantized_base_are_no_base(bits: str, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    (path,) = run.checkpoint.glob(f"*/{STATE}")
    state = torch.load(path, weights_only=False)
    adapted = [name for name in state["module"] if name.endswith("lora_A.default.weight")]
    for name in adapted:
        layer = name.removesuffix("lora_A.default.weight")
        state["module"] |= {f"{layer}base_layer.{n}": v for n, v in CONSTANTS[bits].items()}
    torch.save(state, path)
    name_base(run, str(run.base))

    facts = run.merge()

    assert any(str(run.base) in note and "merged into" in note for note in facts["notes"])
    assert any("ran on a quantized base" in note for note in facts["notes"])
    run.require_same_logits()


def test_what_is_amiss_with_the_folder_of_a_base_is_said(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    name_base(run, str(run.base))
    path = run.base / "config.json"
    text = path.read_text()

    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json .*base=DIR"):
        run.prepare()
    path.write_text(text)
    (run.base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors"):
        run.prepare()


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_shard_of_the_base_that_is_missing_is_named(form: str, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    stem, _, end = form.partition(".")
    (run.base / "model.safetensors").unlink()
    shard = f"{stem}-00002-of-00002.{end}"
    index = {"weight_map": {"a": f"{stem}-00001-of-00002.{end}", "b": shard}}
    (run.base / f"{form}.index.json").write_text(json.dumps(index))
    (run.base / f"{stem}-00001-of-00002.{end}").touch()

    with pytest.raises(CheckpointError, match=rf"{shard} is missing: {form}\.index\.json") as error:
        run.prepare(base=run.base)
    assert error.value.kind == "incomplete"


@pytest.mark.parametrize("token", [None, 0])
def test_a_classifier_without_a_padding_token_is_noted(token: int | None, tmp_path: Path) -> None:
    run = Run("classes", tmp_path)
    path = run.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": token}))

    notes = run.prepare(config=run.base).product.notes

    assert (token is None) == any("LlamaForSequenceClassification raises" in n for n in notes)


def test_the_error_of_a_layer_without_a_weight_says_where_it_was_looked_for(
    tmp_path: Path,
) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    other = tmp_path / "other"
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)

    with pytest.raises(CheckpointError, match=f"neither in the checkpoint nor in {other}"):
        run.prepare(base=other)
