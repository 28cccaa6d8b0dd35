"""Trainings that go on: from the newest whole checkpoint, and as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ROOT, free_port, launcher, surroundings, torchrun
from run_folders import commit, real, small

import ckpt
from ckpt.runs.run import open_checkpoint
from ckpt.saving import continuity
from ckpt.saving.choosing import choose
from ckpt.saving.reading import Mapped, require_memory
from ckpt.saving.source import Source
from converters.errors import CheckpointError

WORKER = "tests/resume_worker.py"
LIMIT = 900  # seconds; a launch takes 10 to 45, and minutes more where an extension is compiled
# One worker of the test run at a time: DeepSpeed compiles an extension at its first start.
trains = pytest.mark.xdist_group("training-more")


@trains
def test_a_resumed_training_is_the_undisturbed_one_in_every_bit(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "first", limit=LIMIT)
    said = torchrun(WORKER, tmp_path, "second", limit=LIMIT)  # where all is compared
    assert "global_steps      5                         5" in said
    said = torchrun(WORKER, tmp_path, "alone", ranks=1, limit=LIMIT)
    error, other = (text for text, _ in json.loads((tmp_path / "alone-0.json").read_text()))
    folder = tmp_path / "zero1/fore/checkpoint-5"
    command = f"ckpt reshard {folder} --world-size 1 --stage 1 -o {folder}-z1-w1"
    assert (
        f"of 2 ranks with ZeRO stage 1, this training has 1 with stage 1; run: {command}" in error
    )
    assert "train_batch_size: 4 saved, 2 now" in other
    assert said.count("resharding to") == 1


@trains
def test_a_trainer_and_accelerate_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    for _ in range(2):
        torchrun(WORKER, tmp_path, "trainers", limit=LIMIT)


@trains
def test_without_the_optimizer_the_weights_are_those_of_the_tag_in_full_precision(
    tmp_path: Path,
) -> None:
    torchrun(WORKER, tmp_path, "weights", limit=LIMIT)


@trains
def test_what_is_amiss_is_told_on_every_rank_and_never_becomes_a_fresh_start(
    tmp_path: Path,
) -> None:
    said = torchrun(WORKER, tmp_path, "wrong", limit=LIMIT)
    cut = "manifest.json lists global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert f"ckpt: passed over {tmp_path}/torn/checkpoint-3: {cut}" in said
    assert re.search(rf"passed over {tmp_path}/spoilt/checkpoint-3: .*CRC32", said)
    mine, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    expected = {
        "torn": f"checkpoint-3 cannot be resumed from: {cut}",
        "torn-tag": "the newest committed one is",
        "tag": "no checkpoint for global_step7",
        "absent": "checkpoint-7 does not exist",
        "spoilt": "/checkpoint-3: global_step3/",
        "gone": "manifest.json lists rng_state_1.state: missing",
        "bare": "ckpt doctor",
        "bare-one": "load_foreign=True loads it all the same",
        "unknown": "rank 1: ",
        "extra": "extra other was not saved",
        "extra-less": "extra sampler was saved, and is not given",
        "asks": "rank 1: it asks to resume from",
        "option": "on_mismatch='shrug'",
        "rate": "rank 0: lr: ",
        "config": "config: gradient_clipping: None saved, 0.5 now",
        "stage": "--world-size 2 --stage 3 --sub-group-size 1000000000 -o",
        "stage-named": "ckpt reshard",
    }
    assert set(mine) == set(expected)
    for name, text in expected.items():
        assert text in mine[name][0], (name, mine[name])
        # Of two that differ the first to speak is heard by both.
        assert mine[name][0] == other[name][0], name
        assert mine[name][1] < 15 and other[name][1] < 15, name


@trains
def test_nodes_with_folders_of_their_own_go_on_from_what_all_of_them_have(tmp_path: Path) -> None:
    port, started = free_port(), []
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
        options = ["--nnodes", "2", "--node_rank", str(node), "--master_addr", "localhost"]
        command = launcher(WORKER, tmp_path, "nodes", ranks=1, port=port, options=options)
        environment = surroundings() | {"NODE_FOLDER": str(tmp_path / f"node{node}")}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
    for process in started:
        _, text = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, text[-3000:]
    mine, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert [text for text, _ in mine] == [text for text, _ in other]
    torn, one, none = (text for text, _ in mine)
    assert "rank 1: " in torn and "rng_state_1.state: missing" in torn
    assert "none that can be resumed from" in one and "rank 1: this rank does not see it" in one
    assert "rank 1: this rank sees" in none and "rank 0 sees no checkpoint" in none


@trains
def test_a_resume_takes_no_memory_but_what_stays(tmp_path: Path) -> None:
    for kind in ("save", "ckpt"):
        torchrun(WORKER, tmp_path, "memory", limit=LIMIT, KIND=kind)
    for rank in (0, 1):
        peak, after, part, _ = json.loads((tmp_path / f"memory-ckpt-{rank}.json").read_text())
        assert peak <= part, (peak, part)
        assert peak - after < 16 << 20, (peak, after)


def test_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ckpt.find(tmp_path / "out") is None
    run = tmp_path / "run"
    for step in (1, 2):
        real(run, step)
    small(run, 3, tier="weights")
    torn = real(run, 4).folder / "global_step2/mp_rank_00_model_states.pt"
    os.truncate(torn, 100)
    (real(run, 5).folder / "manifest.json").unlink()
    small(run, 6)  # committed, but no checkpoint that could be loaded
    assert ckpt.find(run) == str(run / "checkpoint-2")
    said = capfd.readouterr().err
    for step, why in ((6, "mp_rank_00"), (5, "no manifest"), (4, "100"), (3, "weights only")):
        line = next(line for line in said.splitlines() if f"checkpoint-{step}:" in line)
        assert why in line, line
    assert ckpt.find(run / "checkpoint-1") == str(run / "checkpoint-1")
    with pytest.raises(CheckpointError, match="checkpoint-4 cannot be resumed from"):
        ckpt.find(run / "checkpoint-4")
    with pytest.raises(CheckpointError, match="does not exist"):
        ckpt.find(run / "checkpoint-9")


def test_a_tag_that_is_not_there_is_never_replaced_by_another(tmp_path: Path) -> None:
    folder = real(tmp_path, 1).folder
    for path, tag in ((tmp_path, "2"), (folder, "global_step3"), (folder, "1")):
        with pytest.raises(CheckpointError, match=f"tag {tag}|no checkpoint for {tag}"):
            choose(None, path, tag)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no such folder"):
        choose(None, folder, "global_step3", load_foreign=True)
    for path, tag in ((folder, "global_step2"), (tmp_path, "1"), (tmp_path, "checkpoint-1")):
        found = choose(None, path, tag, load_foreign=True)
        assert found is not None and found.folder == folder


def test_a_run_that_deepspeed_saved_into_before_is_still_a_run(tmp_path: Path) -> None:
    folder = real(tmp_path, 3).folder
    shutil.copytree(folder / "global_step2", tmp_path / "global_step2")
    assert ckpt.find(tmp_path) == str(folder)
    with pytest.raises(CheckpointError, match="for global_step2"):
        choose(None, tmp_path, "global_step2", load_foreign=True)  # which of the two?
    old = tmp_path / "global_step2"
    source = Source.of(open_checkpoint(old))
    assert (source.folder, source.tag) == (tmp_path, "global_step2")


def test_reading_every_byte_finds_what_sizes_cannot_show(tmp_path: Path) -> None:
    for step in (1, 2):
        real(tmp_path, step)
    path = tmp_path / "checkpoint-2/global_step2/mp_rank_00_model_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")
    assert ckpt.find(tmp_path, verify="data") == str(tmp_path / "checkpoint-1")


def test_a_run_whose_checkpoints_are_all_unusable_is_no_fresh_start(tmp_path: Path) -> None:
    folder = real(tmp_path, 1).folder
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="none that can be resumed from"):
        ckpt.find(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="--adopt"):
        ckpt.find(tmp_path)
    for path in (folder / "global_step2").glob("*optim*"):
        path.unlink()  # a first save that was cut short, by a tool that writes in place
    assert ckpt.find(tmp_path) is None


def test_of_several_nodes_parts_this_nodes_has_to_be_there(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = real(tmp_path, step).folder
        commit(folder, step, node=0, nodes=2)
    (tmp_path / "checkpoint-2/config.json").unlink()
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-1")


def test_only_what_changes_the_training_is_a_mismatch() -> None:
    saved = {"lr": [0.1, 0.2], "global_steps": 5, "config": "a", "train_batch_size": 8, "old": 1}
    config: dict[str, Any] = {
        "steps_per_print": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 1},
    }
    other = config | {
        "steps_per_print": 9,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "sub_group_size": 7},
    }
    now = saved | {"config": "b"}
    assert continuity.mismatches(continuity.compare(saved, now, (config, other))) == []
    clipped = other | {"gradient_clipping": 1.0}
    rows = continuity.compare(saved, now | {"lr": [0.1, 0.1]}, (config, clipped))
    assert continuity.mismatches(rows) == [
        "lr: 0.1, 0.2 saved, 0.1 now",
        "config: gradient_clipping: None saved, 1.0 now",
    ]
    assert continuity.mismatches(continuity.compare(saved, now)) == ["config: a saved, b now"]
    text = continuity.table(rows)
    assert "  ! lr " in text and "    global_steps " in text and "old" in text


def test_what_pointed_into_a_file_gets_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    held = torch.arange(1000.0)
    torch.save({"a": held, "deep": [{"b": held[10:20]}], "ds_config": {"x": 1}, "n": 1}, path)
    reader = Mapped(None, ("n",))
    state = reader.load(str(path))
    kept, view, mine = state["a"], state["deep"][0]["b"], torch.ones(3)
    assert reader.is_mapped(kept) and reader.is_mapped(view) and not reader.is_mapped(mine)
    reader.detach([state, {"mine": mine}])
    assert not reader.is_mapped(kept) and state["a"] is kept
    del state, view
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(kept, held)
    assert reader.config == {"x": 1}


def test_memory_that_would_not_suffice_is_refused_with_numbers(tmp_path: Path) -> None:
    require_memory(tmp_path, [0, 1 << 20])
    with pytest.raises(CheckpointError, match=r"2 ranks .* would read 2,251,799,813,685,248 bytes"):
        require_memory(tmp_path, [1 << 50, 1 << 50])


@trains
def test_the_script_of_the_docs_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/resume.md").read_text()
    (script,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    said = torchrun(str(tmp_path / "train.py"), tmp_path / "out", 6, limit=LIMIT)
    assert "has no checkpoint yet" in said
    said = torchrun(str(tmp_path / "train.py"), tmp_path / "out", 8, limit=LIMIT)
    assert "going on from" in said and "step 4, tag global_step4" in said
    assert ckpt.find(tmp_path / "out") == str(tmp_path / "out/checkpoint-8")
