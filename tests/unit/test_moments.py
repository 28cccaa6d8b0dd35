"""Optimizer states that are not Adam's in fp32: 8-bit codes with their scales, and none at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, live, run, same

import ckpt

STAGES = {"zero2-bf16-w2": "base_optimizer_state", "zero3-bf16-w2": "optimizer_state_dict"}
QUANTIZED = "__bnb_optimizer_quant_state__"
Change = Callable[[dict[str, Any], torch.Tensor], dict[str, Any]]


def changed(tmp_path: Path, name: str, change: Change) -> Path:
    """A fixture with another state for each flat vector."""
    source = tmp_path / name
    shutil.copytree(FIXTURES / name, source)
    for path in sorted(source.glob("*/*optim_states.pt")):
        root = torch.load(path, weights_only=False)
        optimizer = root["optimizer_state_dict"]
        key = "fp32_flat_groups" if "zero3" in name else "single_partition_of_fp32_groups"
        state = optimizer[STAGES[name]]["state"]
        for index, flat in enumerate(optimizer[key]):
            made = change(state.get(index, {}), flat)
            if made:
                state[index] = made
            else:
                state.pop(index, None)
        torch.save(root, path)
    return source


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("nested", [True, False], ids=["since 0.45", "before"])
def test_8_bit_states_are_there_by_name(name: str, nested: bool, tmp_path: Path) -> None:
    def quantized(state: dict[str, Any], flat: torch.Tensor) -> dict[str, Any]:
        moments = state["exp_avg"].float()
        blocks = -(-len(flat) // 256)
        inner = {
            "state1": (moments * 1e6).to(torch.uint8),
            "qmap1": torch.arange(256.0),
            "absmax1": torch.arange(float(blocks)),
        }
        return {"step": 2, **({QUANTIZED: inner} if nested else inner)}

    source = changed(tmp_path, name, quantized)
    with ckpt.open(source) as weights:
        for key, value in live(FIXTURES / name)["exp_avg"].items():
            if not value.numel():
                continue
            state = weights.optimizer_state(key)
            assert same(state["state1"], (value.float() * 1e6).to(torch.uint8)), key
            assert same(state["qmap1"], torch.arange(256.0))
            assert state["absmax1"].dtype is torch.float32 and state["absmax1"].dim() == 1
            assert state["step"] == 2


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kept", [{}, {"step": 3}], ids=["nothing", "step"])
def test_sgd_without_momentum_has_an_empty_state(
    name: str, kept: dict[str, Any], tmp_path: Path
) -> None:
    source = changed(tmp_path, name, lambda _state, _flat: dict(kept))
    with ckpt.open(source) as weights:
        for key in live(FIXTURES / name)["exp_avg"]:
            if weights[key].numel():
                assert weights.optimizer_state(key) == kept
        with pytest.raises(KeyError, match="is not trained"):
            weights.optimizer_state("frozen.weight")


@pytest.mark.parametrize("name", STAGES)
def test_8_bit_states_are_not_resharded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantized(state: dict[str, Any], flat: torch.Tensor) -> dict[str, Any]:
        return {"step": 2, QUANTIZED: {"state1": flat.to(torch.uint8), "qmap1": torch.ones(256)}}

    source = changed(tmp_path, name, quantized)
    run("reshard", source, "-o", tmp_path / "out", "--world-size", 3, code=1)
    said = capsys.readouterr().err
    assert "8-bit" in said and "different saves" not in said
