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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("named_by", ["model", "optimizer"])
def test_each_layer_with_parameters_is_missed(ranks: int, named_by: str, tmp_path: Path) -> None:
    folder = tmp_path / "global_step2"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step2")
    stages = (["tied_modules.embed.weight", "2.weight"], ["3.norm.bias"])
    for stage, names in enumerate(stages):
        groups = [dict.fromkeys(names, 1)]
        shapes = groups if named_by == "model" else None
        root = {"module": None, "mp_world_size": 2, "dp_world_size": 1, "param_shapes": shapes}
        torch.save(root, folder / f"mp_rank_0{stage}_model_states.pt")
        state = {"param_slice_mappings": groups} if named_by == "optimizer" else {}
        name = f"bf16_zero_pp_rank_0_mp_rank_0{stage}_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / name)

    layers = (0, 2, 3)  # 0 is the tied one, 1 a function
    for layer in layers:
        for rank in range(ranks):
            middle = "" if ranks == 1 else f"-model_0{rank}"
            torch.save({}, folder / f"layer_0{layer}{middle}-model_states.pt")
    assert require_parallel(tmp_path) == "global_step2"

    for layer in layers:
        files = sorted(folder.glob(f"layer_0{layer}*"))
        for path in files:
            path.rename(tmp_path / path.name)
        with pytest.raises(CheckpointError, match=r"has no file of (?:the )?layer") as error:
            require_parallel(tmp_path)
        assert error.value.kind == "incomplete"
        for path in files:
            (tmp_path / path.name).rename(path)
