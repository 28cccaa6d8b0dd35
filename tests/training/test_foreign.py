"""Checkpoints that ckpt did not write: what they prove to be, and when they are gone on from."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_ranks
from oracles import FIXTURES
from run_folders import commit, real, small
from stock_checkpoints import accelerates, dcp, lightnings, sharded, state, stock, trainers

import ckpt
from ckpt.cli.main import main
from ckpt.resuming.select import select_checkpoint
from ckpt.runs.foreign import completeness, liveness
from ckpt.runs.foreign.completeness import prove
from ckpt.runs.foreign.proofs import Proof
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.user_paths import checkpoints_at
from converters.errors import CheckpointError

Make = Callable[[Path], None]


@pytest.mark.parametrize("part", ["trainer", "loops", "lightning"])
def test_trainings_without_ckpt_and_deepspeed_go_on_where_find_says(
    part: str, tmp_path: Path
) -> None:
    worker = "tests/workers/stock_worker.py"
    ended = warm_ranks.run(
        worker, [tmp_path, part], ranks=1, limit=300, environment={}, elastic=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda run: trainers(run / "checkpoint-6", 6), "the Trainer without DeepSpeed"),
        (lambda run: trainers(run / "checkpoint-6", 6, ranks=1), "the Trainer without DeepSpeed"),
        (lambda run: sharded(run / "checkpoint-6", 6), "the Trainer with FSDP"),
        (lambda run: stock(run, 6), "the Trainer with DeepSpeed"),
        (lambda run: accelerates(run / "checkpoint_6"), "Accelerate without DeepSpeed"),
        (lambda run: accelerates(run / "step_6"), "Accelerate without DeepSpeed"),
        (lambda run: lightnings(run / "epoch=0-step=6.ckpt", 6), "Lightning"),
        (lambda run: dcp(run / "step-6"), "torch's distributed checkpoint"),
    ],
)
def test_the_newest_is_found_whoever_wrote_it(
    make: Make, kind: str, tmp_path: Path, logged: Callable[[], str]
) -> None:
    make(tmp_path / "run")
    (path,) = (tmp_path / "run").iterdir()
    assert prove(path).kind == kind
    assert ckpt.find(tmp_path / "run") == str(path)
    assert f"{path} is complete, not committed (written by {kind})" in logged()
    assert ckpt.find(path) == str(path)
    assert ckpt.find(tmp_path / "run", verify="data") == str(path)


def test_a_run_of_ddp_goes_on_from_its_newest_whole_checkpoint(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    for step in (2, 4, 6, 8, 10):
        trainers(tmp_path / f"checkpoint-{step}", step)
    os.truncate(tmp_path / "checkpoint-6/optimizer.pt", 700)
    (tmp_path / "checkpoint-8/trainer_state.json").unlink()
    (tmp_path / "checkpoint-10/rng_state_0.pth").unlink()
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-4")
    said = logged().splitlines()
    for step, why in ((10, "none of rank 0"), (8, "no trainer_state.json"), (6, "cut short")):
        assert any(f"checkpoint-{step}: " in line and why in line for line in said), said


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "optimizer_0/.metadata",
        "pytorch_model_fsdp_0/__0_0.distcp",
        "optimizer_0/__0_0.distcp",
        "scheduler.pt",
        "rng_state_0.pth",
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_a_torn_checkpoint_of_fsdp_is_none(name: str, cut: bool, tmp_path: Path) -> None:
    path = sharded(tmp_path / "checkpoint-6", 6) / name
    os.truncate(path, path.stat().st_size // 2) if cut else path.unlink()
    with pytest.raises(CheckpointError):
        prove(tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match=r"none that can be resumed from.*checkpoint-6: "):
        ckpt.find(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_torn_checkpoint_of_accelerate_is_none(name: str, cut: bool, tmp_path: Path) -> None:
    path = accelerates(tmp_path / "checkpoint_6") / name
    os.truncate(path, path.stat().st_size // 2) if cut else path.unlink()
    with pytest.raises(CheckpointError, match="none that can be resumed from"):
        ckpt.find(tmp_path)


def test_a_shard_that_the_index_names_has_to_be_there(tmp_path: Path) -> None:
    folder = trainers(tmp_path / "checkpoint-2", 2)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert prove(folder).resumable
    index["weight_map"]["v"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not there"):
        prove(folder)


def test_layouts_that_are_not_converted_prove_that_no_file_is_missing(tmp_path: Path) -> None:
    for name in ("pp_z1bf", "moe_s2", "tp_z2_w4"):
        folder = tmp_path / name / "checkpoint-2"
        shutil.copytree(FIXTURES / "corpus" / name, folder)
        assert ckpt.find(folder.parent) == str(folder)
        part = min(folder.glob("*/*zero_pp_rank_0_mp_rank_0*optim_states.pt"))
        os.truncate(part, 2000)
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            ckpt.find(folder.parent)
        part.unlink()
        with pytest.raises(
            CheckpointError, match=r"lacks zero_pp_rank_\*_mp_rank|optimizer files of rank 0 are"
        ):
            ckpt.find(folder.parent)


def test_what_looks_like_a_checkpoint_and_is_of_no_known_kind_is_no_fresh_start(
    tmp_path: Path,
) -> None:
    assert ckpt.find(tmp_path) is None
    (tmp_path / "logs").mkdir()
    assert ckpt.find(tmp_path) is None
    (tmp_path / "iter_5").mkdir()
    (tmp_path / "iter_5/weights.npz").write_bytes(b"of another tool")
    with pytest.raises(CheckpointError, match=r"iter_5.*a file of numpy"):
        ckpt.find(tmp_path)


def test_checkpoints_in_a_folder_that_their_writer_made_are_named(tmp_path: Path) -> None:
    accelerates(tmp_path / "checkpoints/checkpoint_0")
    with pytest.raises(CheckpointError, match=r"checkpoints does: name that folder"):
        ckpt.find(tmp_path)
    assert ckpt.find(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint_0")


LOG = [{"loss": 1.5, "step": 1}, {"loss": float("nan"), "step": 2}]
MORE = [*LOG, {"loss": 0.5, "step": 4}]


def committed(run: Path, step: int, log: Any = None) -> Path:
    """One that ckpt wrote just before now."""
    folder = stock(run, step, log)
    commit(folder, step)
    path = folder / "manifest.json"
    held = json.loads(path.read_text()) | {"created": time.time() - 100}
    del held["digest"]
    path.write_text(json.dumps(held))
    return folder


def test_after_a_week_without_ckpt_the_newest_is_gone_on_from(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    committed(tmp_path, 2, LOG)
    whole, torn = stock(tmp_path, 4, MORE), stock(tmp_path, 6, MORE)
    os.truncate(torn / "latest", 0)
    assert ckpt.find(tmp_path) == str(whole)
    said = logged()
    assert (
        f"{whole} is complete, not committed (written by the Trainer with DeepSpeed): going on"
        in said
    )
    found = select_checkpoint(None, tmp_path)
    assert found is not None and found.folder == whole
    assert select_checkpoint(None, tmp_path, "4") == found == select_checkpoint(None, whole)


def test_mixed_runs_never_go_back_in_silence(tmp_path: Path) -> None:
    old = committed(tmp_path, 2, LOG)
    new = trainers(tmp_path / "checkpoint-4", 4, log=MORE)  # a week with DDP
    assert ckpt.find(tmp_path) == str(new)
    with pytest.raises(CheckpointError, match=rf"{new} is a whole .*DeepSpeed cannot.*{old}"):
        select_checkpoint(None, tmp_path)
    found = select_checkpoint(None, old)
    assert found is not None and found.folder == old
    newest = committed(tmp_path, 6, MORE)  # and back
    assert ckpt.find(tmp_path) == str(newest)


def test_a_newer_one_of_another_training_stops_the_resume(tmp_path: Path) -> None:
    old = committed(tmp_path, 2, LOG)
    other = stock(tmp_path, 4, [{"loss": 9.0, "step": 1}, *MORE[1:]])
    for call in (ckpt.find, lambda path: select_checkpoint(None, path)):
        with pytest.raises(CheckpointError, match=rf"{other} is whole.*{old}.*step 1.*another"):
            call(tmp_path)
    assert ckpt.find(old) == str(old) and ckpt.find(other) == str(other)
    shutil.rmtree(other)
    shutil.copytree(FIXTURES / "zero2-fp32-w2", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8/trainer_state.json").write_text(state(8, MORE))
    for rank in (0, 1):
        shutil.copy(old / f"rng_state_{rank}.pth", tmp_path / "checkpoint-8")
    torch.save({"last_epoch": 8}, tmp_path / "checkpoint-8/scheduler.pt")
    with pytest.raises(CheckpointError, match=r"none of the parameters|other parameters"):
        ckpt.find(tmp_path)


def test_what_was_written_before_the_committed_one_does_not_follow_it(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    left = stock(tmp_path, 8)
    for path in [left, *left.rglob("*")]:
        os.utime(path, (1.0, 1.0))
    old = committed(tmp_path, 2)
    assert ckpt.find(tmp_path) == str(old)
    assert f"passed over {left}: was written before {old}" in logged()


def test_one_that_is_being_written_is_not_taken_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trainers(tmp_path / "checkpoint-2", 2)

    def prove(path: Path, tag: Any, **_: Any) -> Any:
        (folder / "rng_state_2.pth").write_bytes(b"begun")
        return completeness.prove(path, tag) if path != folder else Proof(path, "x")

    monkeypatch.setattr(liveness, "prove", prove)
    with pytest.raises(CheckpointError, match=r"is being written right now: .*rng_state_2"):
        ckpt.find(tmp_path)


def test_weights_alone_are_a_fresh_start_that_is_said(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    small(tmp_path / "slim", 2, tier="weights")
    folder = trainers(tmp_path / "only-model/checkpoint-4", 4)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        (folder / name).unlink()
    for run in ("slim", "only-model"):
        assert ckpt.find(tmp_path / run) is None
        said = logged()
        assert "holds weights only" in said and "begins at step 0" in said, said
    with pytest.raises(CheckpointError, match="weights only"):
        ckpt.find(folder)


def test_a_path_that_is_not_there_is_a_new_run_unless_it_is_called_as_a_checkpoint(
    tmp_path: Path,
) -> None:
    real(tmp_path, 2)
    assert ckpt.find(tmp_path / "new-run") is None
    for name in ("checkpoint-7", "weights-7", "last.ckpt", "global_step4", "step_100"):
        with pytest.raises(CheckpointError, match="does not exist"):
            ckpt.find(tmp_path / name)


def test_a_slip_in_the_name_of_a_checkpoint_is_no_new_run(tmp_path: Path) -> None:
    run = tmp_path / "out"
    for step in (2, 500):
        real(run, step)
    for name in ("checkpoint-50", "chekpoint-500", "checkpoint500", "chkpt-500"):
        with pytest.raises(CheckpointError) as raised:
            ckpt.find(run / name)
        assert f"{run} has checkpoint-2 and checkpoint-500" in str(raised.value)
        assert f"did you mean {run / 'checkpoint-500'}?" in str(raised.value)
    for name in ("newrun", "checkpoints", "llama-7b", "run2", "exp-500"):
        assert ckpt.find(run / name) is None


def test_an_error_offers_no_checkpoint_of_another_training(tmp_path: Path) -> None:
    real(tmp_path, 2)
    shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "mine")
    (tmp_path / "mine/latest").unlink()
    with pytest.raises(CheckpointError) as caught:
        select_checkpoint(None, tmp_path / "mine")
    assert "checkpoint-2" not in str(caught.value) and "load_foreign" not in str(caught.value)


def test_a_state_of_save_model_in_the_run_hides_nothing(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    folder = committed(tmp_path, 2, LOG)
    shutil.copytree(FIXTURES / "zero2-bf16-w2/global_step2", tmp_path / "global_step8")
    (tmp_path / "latest").write_text("global_step8")
    assert [c.name for c in checkpoints_at(tmp_path)] == ["checkpoint-2", "global_step8"]
    assert ckpt.find(tmp_path) == str(folder)
    assert "global_step8: it is a state of the engine alone" in logged()
    shutil.copytree(tmp_path / "global_step8", tmp_path / "global_step2")
    found = select_checkpoint(None, tmp_path, "2")  # as the ResumeCallback asks
    assert found is not None and found.folder == folder


def test_weights_that_were_deleted_are_missed_by_no_resume(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    for step in (2, 4):
        committed(tmp_path, step, LOG)
    folder = tmp_path / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    found = open_checkpoint(folder)
    assert found.committed and found.unusable is None and found.lacks == "lacks model.safetensors"
    for verify in ("structure", "data"):
        assert ckpt.find(tmp_path, verify=verify) == str(folder)  # type: ignore[arg-type]
    newest = Run(tmp_path).newest()
    assert newest is not None and newest.folder == folder
    (folder / "scheduler.pt").unlink()
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "scheduler.pt: missing" in logged()


def test_a_save_dir_of_deepspeed_is_gone_on_from_where_latest_says_or_at_another_tag(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path / "out")
    shutil.copytree(tmp_path / "out/global_step2", tmp_path / "out/global_step1")
    out = tmp_path / "out"
    assert ckpt.find(out) == str(out)  # latest names global_step2
    assert select_checkpoint(None, out, "global_step1") == open_checkpoint(out)
    next((out / "global_step2").glob("*rank_1*optim*")).unlink()
    assert ckpt.find(out) == str(out / "global_step1")
    assert "global_step2: it has no manifest.json, and is not whole" in logged()


@pytest.mark.parametrize("count", [1, 2])
def test_a_save_over_an_older_one_that_was_interrupted_is_none(count: int, tmp_path: Path) -> None:
    for step in (2, 4):
        folder = trainers(tmp_path / f"checkpoint-{step}", step)
        for path in folder.iterdir():
            os.utime(path, (1e9, 1e9))
    for name in ("model.safetensors", "optimizer.pt")[:count]:  # in the order of writing
        os.utime(folder / name, (1e9 + 60, 1e9 + 60))
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")
    for index, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        os.utime(path, (2e9 + index, 2e9 + index))  # a copy that keeps no times
    assert ckpt.find(tmp_path) == str(folder)


def test_an_interrupted_save_of_deepspeed_over_an_older_one_is_none(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = stock(tmp_path, step)
        for path in folder.rglob("*"):
            os.utime(path, (1e9, 1e9))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert ckpt.find(tmp_path) == str(folder)  # no resume needs them
    part = next((folder / "global_step2").glob("*rank_1*"))
    part.write_bytes(part.read_bytes())
    assert ckpt.find(tmp_path) == str(folder)  # by its values it is of the same save
    content = torch.load(part, weights_only=False)
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[:] = [group.detach() * 1.01 for group in groups]
    torch.save(content, part)
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")


def test_latest_says_which_newer_one_a_resume_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(tmp_path, 2, LOG)
    new = stock(tmp_path, 4, MORE)
    with pytest.raises(SystemExit) as exit:
        main(["latest", str(tmp_path)])
    said = capsys.readouterr()
    assert exit.value.code == 0 and said.out == f"{new}\n"
    assert (
        f"{new} is complete, not committed: written by the Trainer with DeepSpeed; ckpt doctor "
        f"{new} --adopt commits it"
    ) in said.err


def test_damaged_weights_of_a_run_of_weights_are_no_lost_training(tmp_path: Path) -> None:
    folder = small(tmp_path, 2, tier="weights").folder
    os.truncate(folder / "model.safetensors", 3)
    assert ckpt.find(tmp_path) is None
