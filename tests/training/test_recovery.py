"""fp32 weights back inside the training script: the flows of the Hugging Face guide to DeepSpeed.

From the last checkpoint, and by live recovery from ``checkpoint-final``, also where
load_best_model_at_end has loaded another checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import live, same, torchrun, weights_in


@pytest.mark.parametrize(
    ("name", "which"),
    [("trainer-zero2", "last"), ("trainer-zero3", "last"), ("trainer-zero3", "best")],
)
def test_a_trainers_model_is_ordinary_again_with_the_checkpoints_weights(
    name: str, which: str, tmp_path: Path
) -> None:
    torchrun("tests/workers/recovery_worker.py", tmp_path, name, which)
    masters = live(tmp_path)["fp32"]
    for number in ("0", "1"):
        found = weights_in(tmp_path / number)
        assert len(found) >= len(masters) - 1
        for key, value in found.items():
            assert value.dtype in (torch.bfloat16, torch.float32)
            assert same(value, masters[key].to(value.dtype)), key
