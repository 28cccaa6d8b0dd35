"""A run trained here and now, by real processes, then converted as a newcomer would do it."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles import FIXTURES, convert, live, root_of, same, torchrun

# One worker of the test run at a time: DeepSpeed compiles an extension at its first start.


@pytest.mark.parametrize("name", ["zero2-bf16-w2", "trainer-zero3"])
def test_a_freshly_trained_checkpoint_is_converted(name: str, tmp_path: Path) -> None:
    torchrun("scripts/fixtures/fixture_worker.py", tmp_path, name)
    weights = convert(root_of(tmp_path / name), tmp_path / "model")
    masters = live(tmp_path / name)["fp32"]
    assert masters.keys() == live(FIXTURES / name)["fp32"].keys()
    owned = [key for key in masters if key in weights]
    assert len(owned) >= len(masters) - 1
    assert all(same(weights[key], masters[key]) for key in owned)
    if name.startswith("trainer"):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", output_loading_info=True
        )
        assert not any(info.values()) and model.lm_head.weight.isfinite().all()
