"""What is given in the place of an engine is said not to be one, with what to give."""

from __future__ import annotations

from pathlib import Path

import pytest
from heavy_libraries import LateModule

import ckpt
from converters.errors import CheckpointError

torch = LateModule("torch")


@pytest.mark.parametrize("call", ["Saver", "resume"])
@pytest.mark.parametrize("several", [False, True])
def test_a_bare_model_in_the_place_of_an_engine_is_said_not_to_be_one(
    call: str, several: bool, tmp_path: Path
) -> None:
    """``live.save_fp32`` says the same, without what a training of plain torch gives."""
    model = torch.nn.Linear(2, 3)
    expected = (
        "Linear is not a DeepSpeed engine; pass what deepspeed.initialize returned (of a Trainer: "
        "trainer.model_wrapped), or model=... and optimizer=... of a training without DeepSpeed"
    )
    with pytest.raises(CheckpointError) as error:
        getattr(ckpt, call)({"actor": model} if several else model, tmp_path / "out")
    assert str(error.value).endswith(expected)
    assert not (tmp_path / "out").exists()
