"""Of states that are split by tensors, stages or experts every file is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt.runs.foreign.parallel import require_parallel
from converters.errors import CheckpointError

ROOT = {"mp_world_size": 2, "dp_world_size": 2, "num_experts": [3], "ds_config": {}}
NAMES = {
    "tensor": [
        *(f"mp_rank_0{model}_model_states.pt" for model in (0, 1)),
        *(f"zero_pp_rank_{d}_mp_rank_0{m}_optim_states.pt" for d in (0, 1) for m in (0, 1)),
        *(f"layer_0_expert_{expert}_mp_rank_00_model_states.pt" for expert in range(3)),
    ],
    "partitioned": [
        *(f"zero_pp_rank_{d}_mp_rank_0{m}_model_states.pt" for d in (0, 1) for m in (0, 1)),
        *(f"zero_pp_rank_{d}_mp_rank_0{m}_optim_states.pt" for d in (0, 1) for m in (0, 1)),
    ],
    "pipeline": [
        *(f"mp_rank_0{model}_model_states.pt" for model in (0, 1)),
        *(f"layer_0{layer}-model_0{m}-model_states.pt" for layer in (0, 2) for m in (0, 1)),
    ],
}


@pytest.mark.parametrize("form", NAMES)
def test_each_file_is_missed(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "global_step2"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step2")
    for name in NAMES[form]:
        torch.save(ROOT if "mp_rank" in name and "model_states" in name else {}, folder / name)
    assert require_parallel(tmp_path) == "global_step2"

    for name in NAMES[form]:
        aside = (folder / name).rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match="has no file of") as error:
            require_parallel(tmp_path)
        assert error.value.kind == "incomplete"
        aside.rename(folder / name)


def test_shards_of_mics_are_fewer_than_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "global_step2"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step2")
    config = {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    root = ROOT | {"mp_world_size": 1, "dp_world_size": 4, "ds_config": config}
    for data_rank in (0, 1):
        for kind in ("optim", "model"):
            name = f"zero_pp_rank_{data_rank}_mp_rank_00_{kind}_states.pt"
            torch.save(root if kind == "model" else {}, folder / name)
    assert require_parallel(tmp_path) == "global_step2"
