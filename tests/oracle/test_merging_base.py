"""to-fp32 --merge --base: is the base that is named the one that was trained on?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from heavy_libraries import transformers
from safetensors.torch import load_file, save_file
from test_merging import Run

from ckpt.cli import conversion as reports
from ckpt.hub.content.contents import contents
from ckpt.runs.run import open_checkpoint
from ckpt.weights.merge import replication
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.peft.config import AdapterConfig
from converters.peft.merge import changes


def rewrite(run: Run, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Changes the tensors of the base's file."""
    path = run.base / "model.safetensors"
    tensors = {name: change(name, value) for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def test_a_base_with_other_values_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    rewrite(run, lambda _, value: value + 0.01 * torch.randn_like(value))

    with pytest.raises(CheckpointError, match="not the model that was trained on") as error:
        run.prepare(base=run.base)
    assert "other_base=True" in str(error.value)
    with pytest.raises(CheckpointError, match="without base="):
        contents(
            open_checkpoint(run.checkpoint),
            max_shard_size=1 << 40,
            repo="org/merged",
            request=Request(merge=True, base=run.base),
        )

    facts = run.merge(base=run.base, other_base=True)
    assert any("has other values than the checkpoint's frozen" in n for n in facts["notes"])
    run.merge(config=run.base)
    run.require_same_logits()


def test_a_base_without_an_earlier_adapter_is_refused(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)  # most of the model is equal, and what the adapter changes is not

    def earlier(name: str, value: torch.Tensor) -> torch.Tensor:
        return value + 1e-3 if "proj.weight" in name and "mlp" not in name else value

    rewrite(run, earlier)
    with pytest.raises(CheckpointError, match="not the model that was trained on"):
        run.prepare(base=run.base)


def test_a_few_other_values_are_noted(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    rewrite(run, lambda name, value: value + 1 if name == "model.norm.weight" else value)

    facts = run.merge(base=run.base)

    noted = [n for n in facts["notes"] if "has other values" in n]
    assert len(noted) == 1
    assert "such as model.norm.weight" in noted[0]


def test_a_base_that_was_rounded_to_another_type_is_the_same(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    rewrite(run, lambda _, value: value.half())  # its smallest numbers lose bits

    facts = run.merge(base=run.base)

    assert facts["checks"]["unlike_tensors"]
    assert not any("other values" in note for note in facts["notes"])
    assert "or was rounded to another type" in reports.verified(facts)


def test_a_merged_model_without_some_of_its_names_is_refused(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    path = run.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))

    with pytest.raises(CheckpointError, match="in neither the checkpoint nor the base") as error:
        run.prepare(config=run.base)

    assert error.value.kind == "unloadable"
    assert "model.layers.2." in str(error.value)
    assert not (run.prepare(config=run.base, check="none").verdict.loads)


@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_a_base_saved_from_within_the_model_has_no_head(
    exclude_frozen: bool, tmp_path: Path
) -> None:
    run = Run("lora", tmp_path, exclude_frozen=exclude_frozen)
    inner = transformers.LlamaModel.from_pretrained(run.base)
    tensors = {name: value.clone() for name, value in inner.state_dict().items()}
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})

    if exclude_frozen:
        with pytest.raises(CheckpointError, match=r"nor the base, such as lm_head\.weight"):
            run.merge(base=run.base)
        return
    facts = run.merge(base=run.base)
    assert any("lm_head.weight: not in the base" in note for note in facts["notes"])
    run.require_same_logits()


def test_numbers_are_written_without_a_quantization_in_the_configuration(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    path = run.base / "config.json"
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stated}))

    facts = run.merge(base=run.base)

    assert "quantization_config" not in json.loads((run.output / "config.json").read_text())
    assert any("loses its quantization_config (bitsandbytes)" in n for n in facts["notes"])
    run.require_same_logits()


def test_untie_is_written_into_the_bases_configuration_too(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    path = run.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))

    facts = run.merge(base=run.base)
    assert any("untie=True writes" in note for note in facts["notes"])

    run.merge(base=run.base, untie=True)
    assert json.loads((run.output / "config.json").read_text())["tie_word_embeddings"] is False


class Repeated(Run):
    """A model whose second layer was repeated, with a base of two layers."""

    def save_base(self, base: Any) -> None:
        base.model.layers = base.model.layers[:2]
        base.config.num_hidden_layers, base.config.layer_types = 2, ["full_attention"] * 2
        super().save_base(base)


@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_repeated_layers_are_layers_of_the_merged_model(
    exclude_frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft_models._lora(layer_replication=[[0, 2], [1, 2]])
    monkeypatch.setitem(peft_models.KINDS, "repeated", (peft_models.llama, lambda: config))
    run = Repeated("repeated", tmp_path, exclude_frozen=exclude_frozen)

    for place in ("base",) if exclude_frozen else ("base", "config"):
        facts = run.merge(**{place: run.base})
        written = json.loads((run.output / "config.json").read_text())
        assert written["num_hidden_layers"] == 3
        assert any("by layer_replication" in note for note in facts["notes"])
        run.require_same_logits()


def test_what_layer_replication_does_not_say_is_an_error() -> None:
    for wrong in ("all", [[0]], [[0, 10**9]], [[2, 1]], {"0": 1}):
        config = AdapterConfig("LORA", {"layer_replication": wrong})
        with pytest.raises(CheckpointError, match="layer_replication is"):
            replication.layers([config])


@pytest.mark.parametrize("own", [False, True])
def test_the_way_out_of_a_changed_base_is_one_that_is_there(own: bool) -> None:
    config = AdapterConfig("LORA", {"init_lora_weights": "pissa"})
    with pytest.raises(CheckpointError) as error:
        changes.require_fitting_base(config, "base", own)
    assert ("merge into the copy in the checkpoint" in str(error.value)) is own
    assert ("has only what was trained" in str(error.value)) is not own


def test_experts_in_one_tensor_are_refused_with_what_made_them_so() -> None:
    config = AdapterConfig("LORA", {"target_parameters": ["mlp.gate.weight"]})
    with pytest.raises(CheckpointError, match="of target_modules such as all-linear or gate"):
        changes.require_mergeable(config)
