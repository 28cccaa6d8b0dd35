"""Configurations that fit an adapter and may be another one's: what is said of them is true."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from heavy_libraries import peft
from safetensors.torch import load_file, save_file
from test_merging import Run

from ckpt.weights.adapters.base_model import BaseModel, Loaded
from ckpt.weights.adapters.named_base import NamedBase
from ckpt.weights.conversion import convert
from ckpt.weights.request import Request
from converters.peft import config_fit, targets
from converters.peft.config import AdapterConfig, parse
from converters.tensors import DType, TensorRef, Weights

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def configure(run: Run, **changes: Any) -> None:
    """Changes what adapter_config.json in the checkpoint says."""
    path = run.checkpoint / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter(run: Run) -> dict[str, Any]:
    """The facts of the adapter that is written."""
    return convert.run(
        convert.prepare(run.checkpoint, run.output, request=Request()), overwrite=True
    )


def lacked(run: Run) -> set[str]:
    """The names that PEFT says are missing when it loads the adapter, as it saves them."""
    base = type(run.model.get_base_model()).from_pretrained(run.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, run.output)
        result = model.load_adapter(str(run.output), "again")
    ends = {"magnitude_vector.again.weight": "magnitude_vector"}
    ends |= {".again.weight": ".weight", ".again": ""}
    found = set()
    for name in result.missing_keys:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None:
            found.add(name.removesuffix(end) + ends[end])
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_of_another_training_beside_the_configuration(stage: int, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, stage, exclude_frozen=True)
    own = load_file(tmp_path / "live" / FILE)
    save_file({name: value.bfloat16() for name, value in own.items()}, run.checkpoint / FILE)
    for facts in (adapter(run), run.merge(base=run.base)):
        assert not any(FILE in note for note in facts["notes"])

    save_file({n: torch.randn_like(value) for n, value in own.items()}, run.checkpoint / FILE)
    configure(run, lora_alpha=64)
    for facts in (adapter(run), run.merge(base=run.base)):
        (note,) = [note for note in facts["notes"] if FILE in note]
        assert "in 8 of 8 tensors" in note and "no tensor tells whether lora_alpha is 64" in note


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("known", ["checkpoint", "disk"])
def test_targets_that_were_not_trained_are_counted(kind: str, known: str, tmp_path: Path) -> None:
    run = Run(kind, tmp_path, exclude_frozen=known == "disk")
    before = adapter(run)
    assert before["loads"] and not before["absent"] and not before["notes"]

    listed = json.loads((run.checkpoint / CONFIG).read_text())["target_modules"]
    changes = {"base_model_name_or_path": str(run.base)} if known == "disk" else {}
    configure(run, target_modules=[*listed, "up_proj", "query_key_value"], **changes)
    facts = adapter(run)

    assert facts["absent"].keys() == lacked(run) and facts["absent"]
    count = len(load_file(run.output / FILE))
    assert facts["verdict"].endswith(f"{count} of {count + len(facts['absent'])} names")
    assert facts["loads"] is False
    assert any("up_proj: targets in adapter_config.json" in note for note in facts["notes"])


def test_targets_that_may_not_be_in_the_base_are_said(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    configure(run, target_modules=["q_proj", "down_proj", "k_proj"])
    facts = adapter(run)
    assert facts["loads"] and not facts["absent"]
    assert any("lists the targets k_proj, and the tensors" in note for note in facts["notes"])


def test_a_base_on_disk_that_is_not_the_one_in_the_checkpoint_is_said(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    configure(run, base_model_name_or_path=str(run.base))
    path = run.base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value.half() for name, value in tensors.items()}, path, {"format": "pt"})
    assert not adapter(run)["notes"]

    earlier = {n: v + 0.01 if "layers.1.self_attn.v_proj" in n else v for n, v in tensors.items()}
    save_file(earlier, path, {"format": "pt"})
    (note,) = adapter(run)["notes"]
    assert f"has other values than {run.base}, in 1 of" in note
    assert "such as model.layers.1.self_attn.v_proj.weight" in note


def config(**values: Any) -> AdapterConfig:
    return parse({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | values)


def test_targets_are_told_by_names_alone() -> None:
    modules = [f"layers.{n}.{name}" for n in range(3) for name in ("q_proj", "k_proj")]
    trained = config_fit.shown((), {}).trained
    for values, expected in (
        ({"target_modules": ["q_proj"]}, [0, 2, 4]),
        ({"target_modules": r".*\.1\.[qk]_proj"}, [2, 3]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": ["k_proj"], "exclude_modules": ["layers.2.k_proj"]}, [1, 3]),
        (
            {"target_modules": ["k_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            [1],
        ),
        ({"target_modules": "all-linear"}, []),
        ({"target_modules": None}, []),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.up"]}, []),
        ({"target_modules": ["q_proj"], "peft_type": "LN_TUNING"}, []),
    ):
        found = targets.unadapted(config(**values), trained, modules)
        assert found == [modules[at] for at in expected], values


def test_experts_that_run_in_one_tensor_are_no_modules() -> None:
    matrix = TensorRef(DType.F32, (0, 0), ())
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj")
    loaded = Loaded(Weights({f"{name}.weight": matrix for name in names}), {})
    for architecture, expected in (("Qwen3MoeForCausalLM", names[:1]), (None, names)):
        stated = Loaded(loaded.weights, {}, "", architecture)
        assert NamedBase(BaseModel(Path()), stated).modules == list(expected)
