"""Trainings that go on: from the newest whole checkpoint, and as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ROOT, torchrun, torchruns
from run_folders import commit, real, small

import ckpt
from ckpt.distributed import host_memory, load_slots
from ckpt.distributed.load_slots import Need
from ckpt.engine.mapped_loading import Mapped
from ckpt.resuming import continuity
from ckpt.resuming.resume_point import ResumePoint
from ckpt.resuming.select import select_checkpoint
from ckpt.runs.run import open_checkpoint
from converters.errors import CheckpointError

WORKER = "tests/workers/resume_worker.py"
LIMIT = 900  # seconds; a launch takes 10 to 45, and minutes more where an extension is compiled


def test_a_resumed_training_is_the_undisturbed_one_in_every_bit(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "first", limit=LIMIT)
    said = torchrun(WORKER, tmp_path, "second", limit=LIMIT)  # where all is compared
    assert re.search(r"^    global_steps +3 +3$", said, re.MULTILINE)
    said = torchrun(WORKER, tmp_path, "alone", ranks=1, limit=LIMIT)
    (error,) = (text for text, _ in json.loads((tmp_path / "alone-0.json").read_text()))
    folder = tmp_path / "zero1/fore/checkpoint-3"
    command = f"ckpt reshard {folder} --world-size 1 --stage 1 -o {folder}-w1"
    assert (
        f"of 2 ranks with ZeRO stage 1, this training has 1 with stage 1; run: {command}" in error
    )
    assert "train_batch_size: 4 saved, 2 now (of other ranks: set grad" in said
    assert said.count("resharding to") == 1


def test_muon_goes_on_in_stage_3_in_whatever_order_it_has_its_matrices(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "muon", limit=LIMIT)


def test_a_trainer_and_accelerate_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    for _ in range(2):
        torchrun(WORKER, tmp_path, "trainers", limit=LIMIT)


def test_without_the_optimizer_the_weights_are_those_of_the_tag_in_full_precision(
    tmp_path: Path,
) -> None:
    torchrun(WORKER, tmp_path, "weights", limit=LIMIT)


def test_what_is_amiss_is_told_on_every_rank_and_never_becomes_a_fresh_start(
    tmp_path: Path,
) -> None:
    said = torchrun(WORKER, tmp_path, "wrong", limit=LIMIT)
    cut = "manifest.json lists global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert f"ckpt: passed over {tmp_path}/torn/checkpoint-3: {cut}" in said
    assert re.search(rf"passed over {tmp_path}/spoilt/checkpoint-3: .*CRC32", said)
    assert f"{tmp_path}/bare/checkpoint-3 is complete, not committed (written by" in said
    assert said.count(f"{tmp_path}/light holds weights only, nothing to resume from") == 2
    mine, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    expected = {
        "torn": f"checkpoint-3 cannot be resumed from: {cut}",
        "torn-tag": "the newest committed one is",
        "tag": "no checkpoint for global_step7",
        "absent": "checkpoint-7 does not exist",
        "spoilt": "/checkpoint-3: global_step3/",
        "gone": "manifest.json lists rng_state_1.state: missing",
        "unknown": "rank 1: ",
        "extra": "extra other was not saved",
        "extra-less": "extra sampler was saved, but was not passed",
        "asks": "rank 1 resumes with",
        "option": "on_mismatch='shrug'",
        "rate": "rank 0: lr: ",
        "config": "gradient_clipping: 0.0 saved, 0.5 now",
        "order": "of the optimizer is ",
        "parameters": "in this training it is embed.weight (20 x 7), and DeepSpeed would take one",
        "uncommitted": "in this training it is embed.weight (20 x 7)",
        "stage": "--world-size 2 --stage 3 --sub-group-size 1000000000 -o",
        "stage-named": "ckpt reshard",
    }
    assert set(mine) == set(expected)
    for name, text in expected.items():
        assert text in mine[name][0], (name, mine[name])
        # Of two that differ the first to speak is heard by both.
        assert mine[name][0] == other[name][0], name
        assert mine[name][1] < 15 and other[name][1] < 15, name


def test_nodes_with_folders_of_their_own_go_on_from_what_all_of_them_have(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    joined = os.pathsep.join(map(str, folders))
    torchruns(WORKER, tmp_path, "nodes", limit=LIMIT, NODE_FOLDERS=joined)
    mine, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert [text for text, _ in mine] == [text for text, _ in other]
    torn, one, none = (text for text, _ in mine)
    assert "rank 1: " in torn and "rng_state_1.state: missing" in torn
    assert "none that can be resumed from" in one and "rank 1: this rank does not see it" in one
    assert "rank 1: this rank sees" in none and "rank 0 sees no checkpoint" in none


def test_a_resume_takes_no_memory_but_what_stays(tmp_path: Path) -> None:
    for kind in ("save", "ckpt"):
        torchrun(WORKER, tmp_path, "memory", limit=LIMIT, KIND=kind)
    for rank in (0, 1):
        peak, after, part, _ = json.loads((tmp_path / f"memory-ckpt-{rank}.json").read_text())
        assert peak <= part, (peak, part)
        assert peak - after < 16 << 20, (peak, after)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, logged: Callable[[], str]) -> None:
    assert ckpt.find(tmp_path / "out") is None
    run = tmp_path / "run"
    for step in (1, 2):
        real(run, step)
    small(run, 3, tier="weights")
    torn = real(run, 4).folder / "global_step2/mp_rank_00_model_states.pt"
    os.truncate(torn, 100)
    (real(run, 5).folder / "manifest.json").unlink()  # of step 2, as its Trainer wrote
    small(run, 6)  # committed, but no checkpoint that could be loaded
    assert ckpt.find(run) == str(run / "checkpoint-2")
    said = logged()
    for step, why in ((6, "mp_rank_00"), (4, "100"), (3, "weights only")):
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
            select_checkpoint(None, path, tag)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no such folder"):
        select_checkpoint(None, folder, "global_step3", load_foreign=True)
    for path, tag in ((folder, "global_step2"), (tmp_path, "1"), (tmp_path, "checkpoint-1")):
        found = select_checkpoint(None, path, tag, load_foreign=True)
        assert found is not None and found.folder == folder


def test_a_run_that_deepspeed_saved_into_before_is_still_a_run(tmp_path: Path) -> None:
    folder = real(tmp_path, 3).folder
    shutil.copytree(folder / "global_step2", tmp_path / "global_step2")
    assert ckpt.find(tmp_path) == str(folder)
    with pytest.raises(CheckpointError, match="for global_step2"):
        select_checkpoint(None, tmp_path, "global_step2", load_foreign=True)  # which of the two?
    old = tmp_path / "global_step2"
    source = ResumePoint.of(open_checkpoint(old))
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
    folder = real(tmp_path, 2).folder
    (folder / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="none that can be resumed from"):
        ckpt.find(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no scheduler.pt.*move the checkpoints away to begin a new"
    ):
        ckpt.find(tmp_path)


def test_of_several_nodes_parts_this_nodes_has_to_be_there(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = real(tmp_path, step).folder
        commit(folder, step, node=0, nodes=2)
    (tmp_path / "checkpoint-2/scheduler.pt").unlink()
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
        "config: gradient_clipping: none saved, 1.0 now",
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


def test_ranks_take_turns_where_memory_does_not_suffice_for_all(tmp_path: Path) -> None:
    """Three ranks, of which as many read at a time as there is room for; stage 3 gathers after."""
    said = torchrun(WORKER, tmp_path, "turns", ranks=3, limit=LIMIT)
    assert said.count(" are available: 1 load at a time") == 4
    assert said.count(" are available: 2 load at a time") == 2
    for stage in (2, 3):
        told = [
            json.loads((tmp_path / f"turns-{stage}-{rank}.json").read_text()) for rank in range(3)
        ]
        for places in (1, 2, 3):
            spans = [(held[str(places)][0], held[str(places)][-1]) for held in told]
            at_once = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
            assert at_once == places, (stage, places, spans)
        words = r"3 ranks .*, one at a time, would need [\d,]+ bytes"
        for rank, held in enumerate(told):
            said = held["none"][0]  # in full on ranks 0 and 1, as rank 0 failed
            assert re.search(words, said) if rank < 2 else "failed on rank 0" in said
            assert "rank 1: RuntimeError: no" in held["failed"][0]
            assert max(held["none"][1], held["failed"][1]) < 15


def test_the_memory_of_a_node_says_how_many_ranks_load_at_a_time(tmp_path: Path) -> None:
    needs = [Need(100, 60), Need(90, 60), Need(100, 60)]  # what stays: 180
    for there, places in ((0, 3), (300, 3), (299, 2), (260, 2), (259, 1), (220, 1)):
        assert load_slots.slot_count(tmp_path, needs, there) == places
    said = r"3 ranks .* need 220 bytes .* \(100 are read by one rank, 180 stay in all\), 219 are"
    with pytest.raises(CheckpointError, match=said):
        load_slots.slot_count(tmp_path, needs, 219)
    assert load_slots.slot_count(tmp_path, [], 1) == 0
    assert load_slots.predecessors([4, 5, 7, 9, 11], 2) == {7: 4, 9: 5, 11: 7}
    assert load_slots.node_memory("1MB") == 10**6 and load_slots.node_memory(7) == 7
    with pytest.raises(CheckpointError, match="memory: "):
        load_slots.node_memory("a lot")


def test_a_container_that_is_allowed_less_has_less(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "sys"
    for path, text in {
        "job/a/memory.max": "1000\n",
        "job/a/memory.current": "700\n",
        "job/a/memory.stat": "anon 500\ninactive_file 150\n",
        "job/memory.max": "max\n",
        "memory/memory.limit_in_bytes": "500\n",
        "memory/memory.usage_in_bytes": "600\n",
        "memory/memory.stat": "total_inactive_file 20\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    proc.write_text("4:cpu,memory:/not/seen/here\n2:pids:/\n0::/job/a\n")
    assert sorted(host_memory.allowed(proc, root)) == [0, 450]
    assert list(host_memory.allowed(tmp_path / "none", root)) == []
    assert 0 < host_memory.available() < 1 << 60


def test_the_script_of_the_docs_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/resume.md").read_text()
    (script,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    said = torchrun(str(tmp_path / "train.py"), tmp_path / "out", 6, limit=LIMIT)
    assert "has no checkpoint to go on from yet" in said
    said = torchrun(str(tmp_path / "train.py"), tmp_path / "out", 8, limit=LIMIT)
    assert "going on from" in said and "step 4, tag global_step4" in said
    assert ckpt.find(tmp_path / "out") == str(tmp_path / "out/checkpoint-8")
