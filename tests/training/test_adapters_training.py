"""Adapters of many kinds, trained with DeepSpeed: what is written loads as the trained model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kinds import KINDS, base_model
from heavy_libraries import peft, transformers
from oracles import run, torchrun, weights_in
from safetensors.torch import load_file

WORKER = "tests/workers/adapters_worker.py"
CASES = [f"{kind}-{stage}" for kind in KINDS for stage in (2, 3)]
MERGED = [case for case in CASES if not case.startswith("prompt")]
# Kinds that round in another order than torch does: DoRA's norm, LoKr's scale.
ULPS = {"dora": 8, "lokr": 2}
IDS = torch.arange(24).reshape(2, 12) * 7 % 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all kinds, and the live engine's fp32 values beside them."""
    out = tmp_path_factory.mktemp("adapters")
    torchrun(WORKER, out, *CASES, limit=900)
    return out


def reference(trained: Path, case: str, rounded: bool) -> Any:
    """The trained model: a base, with the live engine's values in it.

    ``rounded``: the base as the checkpoint has it, which is what the engine computed with.
    """
    kind = case.rpartition("-")[0]
    base = base_model(trained / "base")
    if rounded and kind != "vera":
        for parameter in base.parameters():
            parameter.data = parameter.data.bfloat16().float()
    model = peft.get_peft_model(base, KINDS[kind]())
    values = load_file(trained / f"{case}.safetensors")
    parameters = dict(model.named_parameters())
    assert values and values.keys() <= parameters.keys()
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_the_trained_one(trained: Path, case: str, tmp_path: Path) -> None:
    run("to-fp32", trained / case, "-o", tmp_path / "adapter")

    model = peft.PeftModel.from_pretrained(base_model(trained / "base"), tmp_path / "adapter")

    trained_model = reference(trained, case, rounded=False)
    if case == "embedding-3":  # PEFT saves the whole layer, which the checkpoint has in 16 bits
        layer = trained_model.base_model.model.model.embed_tokens.base_layer.weight
        layer.data = layer.data.bfloat16().float()
    expected = logits(trained_model)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(base_model(trained / "base")))


@pytest.mark.parametrize("case", MERGED)
def test_the_merged_model_is_the_trained_one(trained: Path, case: str, tmp_path: Path) -> None:
    kind, _, stage = case.rpartition("-")
    base = ["--base", trained / "base"] if stage == "2" else ["--config", trained / "base"]
    run("to-fp32", trained / case, "-o", tmp_path / "merged", "--merge", *base)

    expected = reference(trained, case, rounded=stage == "3").merge_and_unload()

    tensors = weights_in(tmp_path / "merged")
    assert tensors.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        tolerance = ULPS.get(kind, 0) * torch.finfo(torch.float32).eps * value.abs().max().item()
        assert (tensors[name] - value).abs().max().item() <= tolerance, name

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_what_cannot_be_merged_or_lacks_its_configuration_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", trained / "prompt-3", "-o", tmp_path / "m", "--merge", code=1)
    assert "prompt" in capsys.readouterr().err.lower()

    bare = tmp_path / "bare"
    shutil.copytree(trained / "lora-3", bare)
    (bare / "adapter_config.json").unlink()
    for more in ((), ("--merge",)):
        run("to-fp32", bare, "-o", tmp_path / "n", *more, code=1)
        assert "--adapter-config" in capsys.readouterr().err
    run("to-fp32", bare, "-o", tmp_path / "n", "--adapter-config", trained / "lora-3")
    assert sorted(load_file(tmp_path / "n/adapter_model.safetensors"))
