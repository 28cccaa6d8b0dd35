"""fp32 weights back inside the training script: both flows of DeepSpeed's integration guides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import live, same, torchrun, weights_in


@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3"])
def test_a_trainers_model_is_ordinary_again_with_the_checkpoints_weights(
    name: str, tmp_path: Path
) -> None:
    torchrun("tests/workers/recovery_worker.py", tmp_path, name)
    masters = live(tmp_path)["fp32"]
    for number in ("0", "1"):
        found = weights_in(tmp_path / number)
        assert len(found) >= len(masters) - 1
        for key, value in found.items():
            assert value.dtype in (torch.bfloat16, torch.float32)
            assert same(value, masters[key].to(value.dtype)), key
