"""Weights out of running trainings of two real processes, compared with checkpoints of theirs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from live_worker import CASES, swapped
from oracles import ROOT, convert, live, raised, run, same, torchrun, weights_in
from safetensors.torch import load_file

# One worker of the test run at a time: DeepSpeed compiles an extension at its first start.
WORKER = "tests/workers/live_worker.py"
LIMIT = 900  # seconds; a launch takes 15 to 60, and minutes more where an extension is compiled
MOST = 32 << 20  # bytes a rank may take for saving 100 MB, over those of the training


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases saved; that training went on unharmed is asserted by the worker."""
    out = tmp_path_factory.mktemp("live")
    torchrun(WORKER, out, "cases", limit=LIMIT)
    return out


def sixteen_bit(case: Path) -> dict[str, torch.Tensor]:
    """What the model computed with, buffers too, all names."""
    kinds = live(case)
    return kinds["live"] | kinds["buffer"]


@pytest.mark.parametrize("name", CASES)
def test_live_fp32_is_the_conversion_of_a_checkpoint(
    name: str, saved: Path, tmp_path: Path
) -> None:
    case = saved / name
    run("to-fp32", case / "checkpoint", "-o", tmp_path / "model")
    run("to-fp32", case / "checkpoint", "-o", tmp_path / "shards", "--max-shard-size", "300B")
    for ours, theirs in (
        (case / "fp32", tmp_path / "model"),
        (case / "shards", tmp_path / "shards"),
    ):
        written = {path.name for path in theirs.iterdir()}
        assert {path.name for path in ours.iterdir()} == written
        for file in written - {"conversion.json"}:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    assert len(list((case / "shards").glob("*.safetensors"))) > 5
    state, model = load_file(case / "state.safetensors"), weights_in(tmp_path / "model")
    assert state.keys() == model.keys()
    assert all(same(state[key], value) for key, value in model.items())


@pytest.mark.parametrize("name", [name for name in CASES if name != "zero1-fp32-grads"])
def test_live_weights_are_those_of_the_engine(name: str, saved: Path) -> None:
    kinds, case = live(saved / name), saved / name
    masters = weights_in(case / "fp32")
    for key, value in sixteen_bit(case).items():
        expected = kinds["fp32"].get(key, value if key in kinds["buffer"] else value.float())
        assert same(masters[key], raised(expected)), key
    low = weights_in(case / "16bit")
    assert low.keys() == masters.keys()
    assert all(same(low[key], value) for key, value in sixteen_bit(case).items())


def test_a_failure_on_one_rank_is_told_on_both_and_soon(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "failures", limit=LIMIT)
    mine, theirs = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    dead, _ = mine.pop("dies")
    assert dead.startswith("save_fp32 failed on rank 1: no sign of life for 3 s")
    expected = {
        "raises": "save_fp32 failed on rank 1: RuntimeError: memory on fire",
        "raises-state": "fp32_state_dict failed on rank 1: RuntimeError: memory on fire",
        "raises-0": "save_fp32 failed on rank 0: RuntimeError: memory on fire",
        "raises-0-state": "fp32_state_dict failed on rank 0: RuntimeError: memory on fire",
        "raises-unshared": "save_fp32 failed on rank 1: RuntimeError: memory on fire",
        "raises-unshared-0": "save_fp32 failed on rank 0: RuntimeError: memory on fire",
        "exists": f"save_fp32 failed on rank 0: {tmp_path}/good0 exists already; pass overwrite",
        "size": "save_fp32 failed on rank 1: its model or arguments are unlike those of rank 0",
        "absent": "save_fp32 failed on rank 1: no sign of life for 2 s",
        "absent-0": "save_fp32 failed on rank 0: no sign of life for 2 s",
        "unlike": "save_fp32 failed on rank 1: the fp32 values of ",
        "placeholder": "save_16bit failed on rank 0: blocks.1.up.weight has 0 of 63 elements",
    }
    for name, start in expected.items():
        for told in (mine, theirs):
            assert told[name][0].startswith(start), (name, told[name])
    # both ranks are wrong here, and either may be the first to say so
    either = re.compile("save_fp32 failed on rank [01]: max_shard_size: 'many' is not a size")
    for told in (mine, theirs):
        assert either.match(told["no size"][0]), told["no size"]
    assert mine.keys() == theirs.keys() >= {*expected, "no size"}
    assert all(seconds < 10 for told in (mine, theirs) for _, seconds in told.values())

    good = tmp_path / "good0"
    for folder in tmp_path.glob("good*"):
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "conversion.json"}
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(("good", "told"))}
    assert left == {"of-rank-0"}  # nothing half there
    unshared = tmp_path / "of-rank-0"
    assert {path.name for path in unshared.iterdir()} == {"unshared", "unshared-16"}
    ours = (unshared / "unshared/model.safetensors").read_bytes()
    assert ours == (good / "model.safetensors").read_bytes()
    low, high = weights_in(unshared / "unshared-16"), weights_in(good)
    assert low.keys() == high.keys() and low["embed.weight"].dtype == torch.bfloat16
    assert all(same(high[key].to(value.dtype), value) for key, value in low.items())


def test_saving_takes_little_memory(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "memory", limit=LIMIT)
    for rank in (0, 1):
        peaks = json.loads((tmp_path / f"peaks{rank}.json").read_text())
        assert len(peaks) == 6
        for name, (peak, _) in peaks.items():
            assert peak < MOST, (name, rank, peak)
    for stage in (2, 3):
        ours = tmp_path / f"fp32-{stage}" / "model.safetensors"
        assert ours.stat().st_size > 96e6
        sent = tmp_path / "of-rank-0" / str(stage) / "model.safetensors"
        assert ours.read_bytes() == sent.read_bytes()


def test_a_hugging_face_model_is_loaded_from_the_folder(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "llama", limit=LIMIT)
    from transformers import AutoModelForCausalLM

    for name, dtype in (("llama", torch.float32), ("llama-16", torch.bfloat16)):
        folder = tmp_path / name
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and model.dtype == dtype
        assert "lm_head.weight" not in weights_in(folder)
        facts = json.loads((folder / "config.json").read_text())
        assert facts["architectures"] == ["LlamaForCausalLM"]
        assert (folder / "generation_config.json").is_file()
    whole, layer = weights_in(tmp_path / "llama"), weights_in(tmp_path / "layer")
    inner = {
        n.removeprefix("model."): v for n, v in whole.items() if n.startswith("model.layers.1")
    }
    assert layer.keys() == inner.keys()
    assert all(same(layer[name], value) for name, value in inner.items())


def compiled(name: str) -> bool:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return any(folder.rglob(f"{name}.so"))


@pytest.mark.skipif(not compiled("async_io"), reason="async_io takes minutes to compile")
def test_nvme_offload(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "nvme", limit=LIMIT)
    for name in swapped(tmp_path):
        case = tmp_path / name
        converted: Any = convert(case / "checkpoint", tmp_path / f"{name}-model")
        ours = weights_in(case / "fp32")
        assert all(same(ours[key], value) for key, value in converted.items())
        low = weights_in(case / "16bit")
        assert all(same(low[key], value) for key, value in sixteen_bit(case).items())


def test_the_script_of_the_docs_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/live.md").read_text()
    (script,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    torchrun(str(tmp_path / "train.py"), tmp_path, limit=LIMIT)
    for name in ("final", "final-bf16"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "model.safetensors",
            "conversion.json",
        }
