"""The Hugging Face Trainer on real ranks: what it saves is committed, and nothing changes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from front_ends import require_model, require_read
from heavy_libraries import LateModule
from oracles import ROOT, same, torchrun
from run_folders import real, small
from safetensors.torch import load_file

import ckpt
from ckpt import Retention
from ckpt.folders import locks
from ckpt.runs import manifest
from ckpt.runs.lease.lease import Lease
from ckpt.runs.lineage import Line
from ckpt.runs.run import Run
from ckpt.runs.user_paths import checkpoints_at
from ckpt.saving.commit.nodes import Nodes
from ckpt.state import rng
from converters.errors import CheckpointError

front_end = LateModule("ckpt.saving.front_end")  # these import DeepSpeed and transformers
hf = LateModule("ckpt.trainers.hf")
trainer_state = LateModule("ckpt.trainers.hf.trainer_state")
trainer_utils = LateModule("transformers.trainer_utils")

WORKER = str((ROOT / "tests/workers/hf_worker.py").relative_to(ROOT))
FILE = "model.safetensors"


def listed(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dict__"):
        return type(one) is type(other) and equal(vars(one), vars(other))
    return bool(one == other)


def state_file(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    ("stage", "ranks", "part"), [(1, 2, "same"), (2, 2, "wide"), (3, 2, "wide"), (3, 3, "same")]
)
def test_training_sees_no_difference_and_finds_what_the_trainer_alone_would_save(
    tmp_path: Path, stage: int, ranks: int, part: str
) -> None:
    torchrun(WORKER, tmp_path, part, stage, ranks=ranks, limit=600)
    here = tmp_path / "here"
    for kind in ("", "-peft") if part == "wide" else ("",):
        step = 1 if kind else 4
        for form in ("mixin", "callback"):
            name = f"{form}{kind}/checkpoint-{step}"
            require_same(here / f"stock{kind}/checkpoint-{step}", here / name)
            found = manifest.read(here / name)
            assert (found.tier, found.step, found.stage) == ("full", step, stage)
            assert (found.tag, found.world_size) == (f"global_step{step}", ranks)
            assert kind or set(found.metrics) == {"eval_loss"}
    held = fp32(here / "stock/checkpoint-4")
    for form in ("mixin", "callback"):
        require_read(here / form, held, tmp_path / form)  # the run, by its latest
        require_model(tmp_path / form, held)
        low = {name: value.bfloat16() for name, value in held.items()}
        require_model(here / form / "checkpoint-4", low)
    if ranks == 3:  # what no two trainings have the same is in none of the tensors
        held = fp32(here / "stock-uneven/checkpoint-1")
        require_read(here / "mixin-uneven", held, tmp_path / "uneven")
    if part == "wide":
        require_same_best(tmp_path)


def fp32(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's own zero_to_fp32 makes of a checkpoint of the Trainer alone."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return {name: value for name, value in found.items() if name != "lm_head.weight"}  # tied


def require_same(stock: Path, mine: Path) -> None:
    """Fails unless a checkpoint has all that the Trainer alone wrote, as it wrote it."""
    found = manifest.read(mine)
    assert manifest.check(mine, found, data=True) == []
    ours = {"manifest.json"} | {rng.NAME.format(rank) for rank in range(found.world_size)}
    assert listed(mine) == listed(stock) | ours
    for path in stock.rglob("*.pt"):
        name = path.relative_to(stock)
        assert equal(state_file(path), state_file(mine / name)), name
    for name in ("config.json", "tokenizer.json", "adapter_config.json", "latest"):
        if (stock / name).exists():
            assert (stock / name).read_text() == (mine / name).read_text()
    for path in stock.glob("*.safetensors"):
        assert equal(load_file(path), load_file(mine / path.name))


def require_same_best(out: Path) -> None:
    """Fails unless the best checkpoint is the one of the Trainer alone, under its own name."""
    for rank in (0, 1):
        ends = json.loads((out / f"best{rank}.json").read_text())
        theirs, ours = ends["stock-best"], ends["mixin-best"]
        assert ours[1] == theirs[1]
        assert (theirs[0], ours[0]) == ("stock-best/checkpoint-1", "mixin-best/checkpoint-1")
    for step in (1, 2):
        text = (out / f"here/mixin-best/checkpoint-{step}/trainer_state.json").read_text()
        assert json.loads(text)["best_model_checkpoint"] == "mixin-best/checkpoint-1"
        assert "saving" not in text


def test_what_is_kept_what_is_written_and_when_it_stops(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "keeping", 3, limit=300)
    from transformers import AutoModelForCausalLM

    gathered = tmp_path / "gathered/checkpoint-2"
    streamed, left_out = tmp_path / "streamed/checkpoint-2", tmp_path / "left-out/checkpoint-2"
    assert FILE not in listed(left_out)
    assert equal(load_file(gathered / FILE), load_file(streamed / FILE))
    assert json.loads((gathered / "config.json").read_text()) == json.loads(
        (streamed / "config.json").read_text()
    )
    model = AutoModelForCausalLM.from_pretrained(streamed)
    assert same(
        model.model.embed_tokens.weight, load_file(gathered / FILE)["model.embed_tokens.weight"]
    )
    assert manifest.check(streamed, manifest.read(streamed), data=True) == []
    run = streamed.parent  # where trainer.save_model() wrote, too
    assert equal(load_file(streamed / FILE), load_file(run / FILE))
    assert not list(run.glob("global_step*")) and (run / "tokenizer.json").exists()
    AutoModelForCausalLM.from_pretrained(run)
    assert [c.name for c in checkpoints_at(left_out.parent)] == [
        "checkpoint-1",
        "global_step2",
        "checkpoint-2",
    ]
    assert ckpt.find(left_out.parent) == str(left_out)
    assert ckpt.find(run) == str(streamed)


def test_a_class_that_saves_no_states_is_refused_at_its_first_save(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "stateless", 2, limit=300)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert set(told) == {"class", "callback"}
        for said in told.values():
            assert "has no global_step1" in said and "_save_checkpoint" in said


def test_a_rank_that_fails_is_told_on_all_and_nothing_is_committed(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "failing", 3, limit=300)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"told{rank}.json").read_text())
        said = "model.safetensors: No space left on device"
        assert told == {
            "model": f"save failed on rank 0: {said}",
            "random": f"save failed on rank 1: {said}",
        }


@pytest.mark.parametrize("end", ["killed", "midway"])
def test_a_rank_that_is_lost_leaves_the_checkpoint_before(tmp_path: Path, end: str) -> None:
    with pytest.raises(AssertionError):
        torchrun(WORKER, tmp_path, end, 3, limit=120)
    if end == "midway":
        told = (tmp_path / "told0").read_text()
        assert told == "save failed on rank 0: zero_to_fp32.py: No space left on device"
    run = Run(tmp_path / "mixin")
    assert [c.name for c in run.checkpoints()] == ["checkpoint-1"]
    newest = run.newest()
    assert newest is not None and trainer_utils.get_last_checkpoint(str(run.path)) == str(
        newest.folder
    )
    assert run.target() == "checkpoint-1/global_step1"


def arguments(**given: Any) -> Any:
    return SimpleNamespace(**{"metric_for_best_model": None, "greater_is_better": None, **given})


def test_what_to_keep_is_what_was_asked_and_the_best() -> None:
    tracked = arguments(metric_for_best_model="loss", greater_is_better=False)
    best = ("eval_loss", "min", 1)
    asked = Retention(last=3, best=("eval_acc", "max", 2))
    assert trainer_state.retention_of(None, arguments(), None) is None
    assert trainer_state.retention_of(None, arguments(), 0) is None
    assert trainer_state.retention_of(None, arguments(), 2) == Retention(last=2)
    assert trainer_state.retention_of(None, tracked, 2) == Retention(last=2, best=best)
    assert trainer_state.retention_of(None, tracked, None) == Retention(every=1, best=best)
    assert trainer_state.retention_of(Retention(), tracked, 2) == Retention(every=1, best=best)
    assert trainer_state.retention_of(Retention(last=5), tracked, 2) == Retention(last=5, best=best)
    assert trainer_state.retention_of(asked, tracked, 2) == asked


def run_folder_of(path: Path) -> front_end.RunFolder:
    """The folder as the only rank of a training has it."""
    return front_end.RunFolder(path, Nodes(0, 1, leads=True, local=False), Lease())


def test_what_stayed_for_being_pushed_goes_when_the_push_is_done(tmp_path: Path) -> None:
    """Report row 34: with save_total_limit=1 all that was pushed was still there at the end."""
    line = Line(None, "")
    folders = [small(tmp_path, step).folder for step in (2, 4)]
    trainer = object.__new__(hf.CommittedCheckpoints)
    trainer._push_locks = [locks.reading(folder) for folder in folders]
    last = Retention(last=1)
    run_folder = run_folder_of(tmp_path)
    trainer._publish_again = partial(
        trainer_state.publish_beside, run_folder, last, None, folders[-1], line
    )
    trainer._publish_again()
    assert all(folder.is_dir() for folder in folders)
    trainer._finish_current_push()
    assert [folder.is_dir() for folder in folders] == [False, True]


def test_metrics_are_those_of_this_step() -> None:
    logs: list[dict[str, Any]] = [
        {"eval_loss": 9.0, "step": 2},
        {"loss": 1.0, "step": 4},
        {"eval_a_loss": 3.0, "eval_a_runtime": 1.0, "epoch": 1.0, "step": 4},
        {"eval_b_loss": 2, "eval_b_steps_per_second": 1.0, "eval_b_text": "no", "step": 4},
    ]
    state = SimpleNamespace(log_history=logs, global_step=4)
    assert trainer_state.evaluated(state) == {"eval_a_loss": 3.0, "eval_b_loss": 2.0}
    assert trainer_state.evaluated(SimpleNamespace(log_history=logs, global_step=6)) == {}


@pytest.mark.parametrize(
    ("greater", "before", "value", "new"),
    [
        (True, None, 1.0, True),
        (True, 1.0, 1.0, False),
        (True, 1.0, 2.0, True),
        (False, 1.0, 2.0, False),
        (False, 1.0, 0.5, True),
        (False, None, float("nan"), False),
    ],
)
def test_a_new_best_is_what_the_trainer_takes_for_one(
    greater: bool, before: float | None, value: float, new: bool
) -> None:
    args = arguments(metric_for_best_model="loss", greater_is_better=greater)
    assert (
        trainer_state.is_new_best(args, SimpleNamespace(best_metric=before), {"eval_loss": value})
        is new
    )
    assert not trainer_state.is_new_best(
        args, SimpleNamespace(best_metric=before), {"eval_other": value}
    )


def test_the_trainers_best_stays_though_a_later_one_is_as_good(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        small(tmp_path, step, {"eval_loss": 1.0 if step in (2, 4) else 5.0})
    keep = Retention(last=1, best=("eval_loss", "min", 1))
    left = {str(tmp_path / "checkpoint-2"): [2, 4, 8], str(tmp_path / "gone"): [4, 8], None: [4, 8]}
    for best, steps in left.items():
        newest = tmp_path / "checkpoint-8"
        trainer_state.publish_beside(run_folder_of(tmp_path), keep, best, newest, Line(None, ""))
        assert [c.step for c in Run(tmp_path).checkpoints()] == steps


def test_a_trainer_without_deepspeed_takes_no_half_of_a_checkpoint_of_deepspeed(
    tmp_path: Path,
) -> None:
    folder = real(tmp_path, 2).folder
    state, seen = SimpleNamespace(global_step=2), {"optimizer": object()}
    for path in (None, folder):
        callback = hf.ResumeCallback(path)
        with pytest.raises(CheckpointError, match="was saved with DeepSpeed, this training has no"):
            callback.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None, **seen)
    (folder / "global_step2").rename(tmp_path / "away")
    (folder / "manifest.json").unlink()
    hf.ResumeCallback().on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None, **seen)
