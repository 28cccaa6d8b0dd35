"""Checkpoints of real trainings on two ranks: whole or absent, and stock tools read them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import faults
from oracles import (
    ROOT,
    convert,
    run,
    same,
    torchrun,
    torchruns,
    weights_in,
)
from saver_worker import CASES

import ckpt
from ckpt.runs import manifest
from ckpt.runs.run import Run
from ckpt.state import plain
from converters.zero import checkpoint as zero

# One worker of the test run at a time: DeepSpeed compiles an extension at its first start.
WORKER = "tests/workers/saver_worker.py"
LIMIT = 900  # seconds; a launch takes 15 to 60, and minutes more where an extension is compiled


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases saved; that losses and weights are those of an undisturbed training, and that
    stock DeepSpeed loads each checkpoint, is asserted by the worker."""
    out = tmp_path_factory.mktemp("saver")
    torchrun(WORKER, out, "cases", limit=LIMIT)
    return out


def equal(one: Any, other: Any) -> bool:
    """Whether two unpickled states are the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return type(one) is type(other) and equal(vars(one), vars(other))
    return bool(one == other)


@pytest.mark.parametrize("which", ["fore", "back"])
@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_of_deepspeed(name: str, which: str, saved: Path) -> None:
    stock, ours = saved / name / "stock", saved / name / which / "checkpoint-2"
    files = sorted(path.relative_to(stock) for path in stock.rglob("*") if path.is_file())
    for file in files:
        if file.suffix != ".pt":
            assert (ours / file).read_bytes() == (stock / file).read_bytes()
            continue
        states = (torch.load(root / file, weights_only=False) for root in (stock, ours))
        assert equal(*states), file
    there = {path.relative_to(ours) for path in (ours / "global_step2").iterdir()}
    assert there == {file for file in files if file.parts[0] == "global_step2"}


@pytest.mark.parametrize("which", ["fore", "back"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_converts_and_holds_the_16_bit_weights(
    name: str, which: str, saved: Path, tmp_path: Path
) -> None:
    case = saved / name
    theirs = convert(case / "stock", tmp_path / "stock")
    ours = convert(case / which, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], value) for key, value in theirs.items())
    source = zero.read(case / which)
    low = weights_in(case / which / "checkpoint-2")
    assert low.keys() == ours.keys() - source.weights.aliases.keys() or low.keys() == ours.keys()
    for key, value in low.items():
        computed = ours[key].half() if source.precision == "fp16" else ours[key]
        exact = key in source.weights.buffers
        assert same(value, (ours[key] if exact else computed).to(value.dtype)), key
        assert exact or value.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_in_the_manifest(name: str, saved: Path) -> None:
    folders = [
        saved / name / "fore/checkpoint-2",
        saved / name / "back/checkpoint-2",
        saved / name / "tight/checkpoint-3",
        saved / name / "tight/weights-4",
    ]
    for folder in folders:
        held = manifest.read(folder)
        assert manifest.check(folder, held, data=True) == []
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == {*held.files, "manifest.json"}
        assert held.world_size == 2 and held.versions["deepspeed"] and held.progress["lr"]
        assert not list(folder.parent.glob(".*"))
        run("verify", folder, "--data")
    assert manifest.read(folders[0]).metrics == {"eval_loss": 1.5}
    assert manifest.read(folders[3]).tier == "weights" and manifest.read(folders[3]).tag is None
    assert (saved / name / "fore/latest").read_text() == "checkpoint-2/global_step2"
    extra = plain.loads(folders[0] / "extra_state_1.state")
    assert extra["sampler"]["names"] == ("a", "b")
    assert torch.equal(extra["sampler"]["order"], torch.arange(5))


@pytest.mark.parametrize("name", CASES)
def test_a_small_budget_of_memory_gives_the_same_checkpoint(
    name: str, saved: Path, tmp_path: Path
) -> None:
    folder = saved / name / "tight"
    tight = manifest.read(folder / "checkpoint-3").files
    whole = manifest.read(saved / name / "whole/checkpoint-3").files
    assert tight.keys() == whole.keys()
    assert all(tight[name] == whole[name] for name in tight if not name.endswith(".state"))
    ours = convert(folder / "checkpoint-3", tmp_path / "ours")
    high = weights_in(folder / "checkpoint-3")  # weights="fp32"
    assert all(same(value, ours[key]) for key, value in high.items())
    assert {value.dtype for value in weights_in(folder / "weights-4").values()} >= {torch.float32}


def test_a_failure_on_one_rank_is_told_on_both_and_commits_nothing(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "failures", limit=LIMIT)
    mine, theirs = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    dead, _ = mine.pop("dies")
    assert dead.startswith("save failed on rank 1: no sign of life for 3 s")
    folder = tmp_path / "run"
    expected = {
        "extra-0": "save failed on rank 0: RuntimeError: memory on fire",
        "extra-1": "save failed on rank 1: RuntimeError: memory on fire",
        "pickle-0": "save failed on rank 0: TypeError: not to be pickled",
        "pickle-1": "save failed on rank 1: TypeError: not to be pickled",
        "plain": "save failed on rank ",
        "metric": "save failed on rank ",
        "tier": "save failed on rank ",
        "step": "save failed on rank 1: it saves checkpoint-71 (step 71, full), rank 0 saves",
        "full": f"save failed on rank 1: {folder}/.checkpoint-",
        "full-later": f"save failed on rank 1: {folder}/.checkpoint-",
        "full-wait": f"save failed on rank 1: {folder}/.checkpoint-",
        "absent": "save failed on rank 1: no sign of life for 2 s",
        "absent-0": "save failed on rank 0: no sign of life for 2 s",
        "twice": f"save failed on rank 0: {tmp_path}/two/.checkpoint-1.saving is in use",
        "closed": "save failed on rank ",
        "state": "save failed on rank 1: RuntimeError: memory on fire",
        "left": "",
        "weights": "Saver failed on rank ",
        "every": "Saver failed on rank ",
        "memory": "Saver failed on rank ",
        "place": "Saver failed on rank ",
    }
    assert mine.keys() == theirs.keys() == expected.keys()
    for name, start in expected.items():
        for told in (mine, theirs):
            text, seconds = told[name]
            assert text.startswith(start) and seconds < 10, (name, told[name])
    for name in ("full", "full-later", "full-wait"):
        assert mine[name][0].endswith("No space left on device")
    assert "metric loss is 'low', expected a number" in mine["metric"][0]
    assert mine["left"][0] == "" and theirs["left"][0] == "the user's own"
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left <= {".checkpoint-95.saving"}
    assert all(checkpoint.committed for checkpoint in Run(folder).checkpoints())


def test_every_file_operation_may_fail_on_every_rank(tmp_path: Path) -> None:
    """Full disk, quota, I/O error and failed fsync at each of them, and a read-only folder:
    committed or refused, on both ranks alike, the newest whole, never a hang; the worker asserts
    that."""
    (tmp_path / "run").mkdir()
    torchrun(WORKER, tmp_path, "faults", limit=LIMIT, **faults.environment(tmp_path / "run"))
    told = json.loads((tmp_path / "told0.json").read_text())
    assert min(told["counts"]) >= 10 and sum(told["counts"]) > 100
    assert told["refused"] > told["committed"] > 0 and told["leftovers"] < 5


@pytest.mark.parametrize("kind", ["term", "usr1", "all", "launcher", "file", "late"])
def test_asked_to_stop_all_ranks_save_the_same_step_once(kind: str, tmp_path: Path) -> None:
    code = -10 if kind == "launcher" else 1  # it is ended by SIGUSR1; the ranks save all the same
    fresh = kind == "launcher"  # of torchrun itself; test_launchers.py has its other signals
    said = torchrun(WORKER, tmp_path, "stop", limit=LIMIT, code=code, fresh=fresh, STOP=kind)
    assert re.search("exit(code  :)? 75", said) or kind == "launcher"
    steps = [c.step for c in Run(tmp_path / "run").checkpoints() if c.committed]
    (last,) = map(int, re.findall(r"saving after step (\d+)", said))
    assert steps == [*range(3, last, 3), last][: 1 if kind == "late" else None]
    # Of one rank's, the optimizer step after the one in which it was asked
    # (5 where all were asked, if both know of it by then)
    steps_asked_for = {"all": (5, 6), "launcher": (5, 6, 7)}.get(kind, (6,))
    assert last in steps_asked_for or kind == "file"
    assert not list((tmp_path / "run").glob(".*"))
    if kind == "late":
        assert f"step {last} is not saved" in said and steps == [3]


def test_the_end_of_the_process_finishes_a_save_or_fails(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path / "well", "ends", limit=LIMIT, END="well")
    assert [c.step for c in Run(tmp_path / "well/run").checkpoints() if c.committed] == [1, 2]
    said = torchrun(WORKER, tmp_path / "bad", "ends", limit=LIMIT, code=1, END="bad", NOTICE="60")
    assert said.count("ckpt: save failed on rank 1: ") == 2 and "exit 1" in said
    assert [c.step for c in Run(tmp_path / "bad/run").checkpoints()] == [1]


def test_what_is_due_is_saved_and_what_no_rule_keeps_is_deleted(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "kept", ranks=3, limit=LIMIT)
    folder = tmp_path / "run"
    names = [checkpoint.name for checkpoint in Run(folder).checkpoints()]
    assert names == ["checkpoint-4", "checkpoint-6", "checkpoint-8", "weights-9"]
    assert (folder / "best").read_text() == "checkpoint-4/global_step4"
    assert (folder / "latest").read_text() == "checkpoint-8/global_step8"
    source = zero.read(folder)  # by the run's own pointer
    assert source.world_size == 3 and source.step == 8
    run("verify", folder, "--data")


def test_folders_are_models_and_adapters_that_their_own_libraries_load(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "llama", limit=LIMIT)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for stage in (1, 2, 3):
        folder = tmp_path / f"whole-{stage}/checkpoint-2"
        expected = torch.load(folder.parent / "live.pt")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and model.dtype == torch.bfloat16
        state = model.state_dict()
        assert all(same(state[key], value.bfloat16()) for key, value in expected.items())
        assert "lm_head.weight" not in weights_in(folder)
        assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()

        folder = tmp_path / f"adapter-{stage}/checkpoint-2"
        expected = torch.load(folder.parent / "live.pt")
        files = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files
        assert not files & {"model.safetensors", "config.json"}
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        state = PeftModel.from_pretrained(base, folder).state_dict()
        trained = [key for key in expected if "lora_" in key or "modules_to_save" in key]
        assert len(trained) == 8 + 5  # A and B of four layers, and all norms
        for key in trained:
            assert torch.equal(state[key], expected[key].bfloat16().float()), key
        assert len(weights_in(folder)) == len(trained)


def two_nodes(folders: list[Path], local: bool, fails: bool) -> dict[str, str]:
    """The environment of two nodes, each with a folder of its own or with the same."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return {
        "NODE_FOLDERS": os.pathsep.join(map(str, folders)),
        "LOCAL": str(int(local)),
        "FAILS": str(int(fails)),
    }


def test_nodes_with_folders_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    nodes = two_nodes(folders, local=True, fails=False)
    torchruns(WORKER, tmp_path, "nodes", limit=LIMIT, **nodes)
    parts = []
    for node, folder in enumerate(folders):
        checkpoints = Run(folder / "run").checkpoints()
        assert [checkpoint.step for checkpoint in checkpoints] == [1, 2]
        held = checkpoints[-1].manifest
        assert held is not None and (held.node, held.nodes) == (node, 2)
        assert sum("optim_states" in name for name in held.files) == 1
        parts.append(checkpoints[-1].folder)
    assert manifest.read(parts[0]).save == manifest.read(parts[1]).save
    run("collect", *parts, "-o", tmp_path / "whole")
    run("verify", tmp_path / "whole", "--data")
    weights = convert(tmp_path / "whole", tmp_path / "model")
    low = weights_in(tmp_path / "whole")
    assert low and all(same(value, weights[key].to(value.dtype)) for key, value in low.items())


@pytest.mark.parametrize("local", [False, True])
def test_a_layout_that_contradicts_the_configuration_stops_at_once(
    local: bool, tmp_path: Path
) -> None:
    shared = [tmp_path / "shared"] * 2 if local else [tmp_path / "node0", tmp_path / "node1"]
    nodes = two_nodes(shared, local=local, fails=True)
    torchruns(WORKER, tmp_path, "nodes", limit=LIMIT, **nodes)
    for rank in (0, 1):
        text, seconds = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert "use_node_local_storage" in text and seconds < 10
        assert ("is shared by all 2 nodes" if local else "is not shared: node 1 of 2") in text
    for folder in shared:
        assert not list((folder / "run").glob("*")) and not list((folder / "run").glob(".nonce*"))


def test_the_script_of_the_docs_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/saving.md").read_text()
    (script,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    torchrun(str(tmp_path / "train.py"), tmp_path / "out", limit=LIMIT)
    checkpoints = Run(tmp_path / "out").checkpoints()
    assert all(checkpoint.committed for checkpoint in checkpoints)
    newest = Run(tmp_path / "out").newest()
    assert newest is not None and newest.step == 12 and len(checkpoints) <= 4


def test_the_saver_is_found_where_it_is_looked_for() -> None:
    assert ckpt.Saver.__module__ == "ckpt.saving.saver"
    with pytest.raises(ValueError, match="not a signal"):
        ckpt.Preemption(signals=("SIGNAL",))
    assert os.EX_TEMPFAIL == 75
