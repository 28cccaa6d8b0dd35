"""What a Saver writes of a PEFT model in training: the names that ``ckpt to-fp32`` gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_models
import pytest
from heavy_libraries import peft
from safetensors.torch import load_file

from ckpt.engine import inventory as live
from ckpt.engine.inventory import Inventory
from ckpt.saving import adapter
from converters.errors import CheckpointError
from converters.tensors import DType


@pytest.fixture(autouse=True)
def _without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory of a model in one process, without DeepSpeed's engine."""
    monkeypatch.setattr(live, "_require_supported", lambda *_: None)


def planned(model: Any) -> tuple[Inventory, dict[str, list[int]]]:
    engine = SimpleNamespace(module=model, optimizer=None)
    inventory, plan = adapter.planned(engine, DType.F32)
    return inventory, {p.name: list(p.source.shape) for p in plan.placements()}


@pytest.mark.parametrize(
    "kind",
    ["dora", "saved-modules", "tied-saved", "embedding", "tied-tokens", "prompt", "ia3", "vera"],
)
def test_the_tensors_are_those_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    model = peft_models.model(kind)
    folder = peft_models.saved(model, tmp_path)
    stored = load_file(folder / "adapter_model.safetensors")
    expected = {name: list(value.shape) for name, value in stored.items()}

    inventory, shapes = planned(model)

    assert shapes == expected
    state = {id(value) for value in model.state_dict(keep_vars=True).values()}
    assert {id(v) for v in (*inventory.parameters.values(), *inventory.buffers.values())} <= state


def test_what_is_computed_when_it_is_saved_is_refused() -> None:
    with pytest.raises(CheckpointError, match="p-tuning is made of its parameters"):
        planned(peft_models.model("p-tuning"))


def test_what_is_trained_beside_the_adapter_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = peft_models.model("lora")
    model.base_model.model.model.norm.weight.requires_grad_(True)

    planned(model)

    assert "model.norm.weight: trained, but not part of the adapter" in caplog.text


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_the_configuration_is_that_of_save_pretrained(task: str | None, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
    model = peft.get_peft_model(peft_models.llama(), config)
    live = peft_models.saved(model, tmp_path / "live") / "adapter_config.json"

    adapter.save_config(model, tmp_path)

    assert json.loads((tmp_path / live.name).read_text()) == json.loads(live.read_text())
