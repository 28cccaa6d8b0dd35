"""Trainings of real processes with Lightning, saved by our strategy and by Lightning's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from front_ends import CASES, LIMIT, case, require_model, require_read, train
from oracles import convert, run, torchrun, weights_in
from run_folders import small
from stock_checkpoints import of_lightning

from ckpt.folders.replacing import replace_folder
from ckpt.runs import manifest
from ckpt.runs.pruning import pin
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.upkeep import adoption
from ckpt.state import rng
from ckpt.trainers.lightning_folders import require_whole
from converters.errors import CheckpointError

WORKER = "tests/workers/trainers_worker_lightning.py"
every_case = pytest.mark.parametrize(("stage", "ranks"), CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all cases. The worker asserts that losses with our saves, and those of a training
    that goes on from one (dropout and all, in the middle and at the end of an epoch), are the ones
    with Lightning's, and that Lightning goes on from ours as from its own."""
    return train(WORKER, tmp_path_factory.mktemp("lightning"))


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in which something goes wrong, or is kept."""
    out = tmp_path_factory.mktemp("turns")
    torchrun(WORKER, out, "turns", limit=LIMIT)
    return out


def told(out: Path) -> dict[str, Any]:
    """What both ranks were told, the same."""
    mine, theirs = (json.loads((out / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert mine == theirs
    return dict(mine)


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


@every_case
def test_saves_are_committed_with_all_that_lightning_wrote(
    stage: int, ranks: int, saved: Path
) -> None:
    folder = case(saved, stage, ranks)
    run = Run(folder / "out")
    found = run.checkpoints()
    assert [c.name for c in found] == [f"step={step}.ckpt" for step in range(1, 7)]
    assert all(checkpoint.committed for checkpoint in found)
    assert run.target() == "step=6.ckpt/checkpoint"
    held = found[2].manifest
    assert held is not None
    assert (held.step, held.stage, held.world_size, held.tier) == (3, stage, ranks, "full")
    assert held.metrics == {"score": 1.0}
    assert {"lightning", "deepspeed", "torch"} <= held.versions.keys()
    stock = folder / "stock" / "step=3.ckpt"
    theirs = {p.relative_to(stock).as_posix() for p in stock.rglob("*") if p.is_file()}
    ours = {rng.NAME.format(rank) for rank in range(ranks)}
    assert held.files.keys() == theirs | ours
    assert manifest.check(found[2].folder, held, data=True) == []
    zips = [name for name in held.files if name.startswith("checkpoint/")]
    assert all(held.files[name].digest.startswith("zip:") for name in zips)


@every_case
def test_latest_and_best_follow_model_checkpoint(stage: int, ranks: int, saved: Path) -> None:
    run = Run(case(saved, stage, ranks) / "ends")
    assert names(run.path) == {"epoch=1.ckpt", "last.ckpt", "latest", "best"}
    assert run.target("best") == "epoch=1.ckpt/checkpoint"
    newest = run.pointer()
    assert newest is not None and newest.committed and newest.step == 4
    assert newest.name == "last.ckpt"  # exchanged for a newer one


@every_case
def test_a_save_is_what_the_engine_held_for_all_that_read_it(
    stage: int, ranks: int, saved: Path, tmp_path: Path
) -> None:
    folder, model = case(saved, stage, ranks), tmp_path / "model"
    live = weights_in(folder / "live")
    require_read(folder / "out", live, model)
    shutil.copy(folder / "config" / "config.json", model)  # Lightning saves none
    named = {name.removeprefix("model."): value for name, value in live.items()}
    require_model(model, named, key_mapping={r"^model\.": ""})

    run("to-fp32", folder / "out", "--format", "lightning", "-o", tmp_path / "one.ckpt")
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)  # as load_from_checkpoint does
    values = one["state_dict"]
    assert live.keys() <= values.keys() and one["global_step"] == 6
    assert all(torch.equal(values[name], value) for name, value in live.items())


def test_a_failure_on_one_rank_is_told_on_both_and_leaves_what_was(turned: Path) -> None:
    assert told(turned)["fails"] == "save_checkpoint failed on rank 1: RuntimeError: no state today"
    assert names(turned / "fails") == {"step=1.ckpt", "latest"}
    assert [c.why for c in Run(turned / "fails").checkpoints()] == [None]


def test_a_link_to_the_last_is_replaced_by_the_last_itself(turned: Path) -> None:
    assert told(turned)["link"] == "step=2.ckpt"
    run = Run(turned / "link")
    assert names(run.path) == {"last.ckpt", "step=4.ckpt", "latest"}
    assert not (run.path / "last.ckpt").is_symlink()
    assert [(c.step, c.why) for c in run.checkpoints()] == [(4, None)] * 2


def test_links_are_exchanged_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for link in (tmp_path / "there", tmp_path / "nowhere", tmp_path / "there"):
        new, final = tmp_path / ".new.saving", tmp_path / "last.ckpt"
        new.mkdir()
        replace_folder(new, final)
        assert final.is_dir() and not final.is_symlink()
        replace_folder_by_link(final, link)
    assert (tmp_path / "there").is_dir() and names(tmp_path) == {"there", "last.ckpt"}


def test_what_is_removed_is_named_by_no_pointer(tmp_path: Path) -> None:
    from ckpt.trainers.lightning_folders import remove

    run = Run(tmp_path)
    for step in (1, 2, 3):
        small(tmp_path, step)
    (tmp_path / "last.ckpt").symlink_to("checkpoint-3")
    run.point("latest", open_checkpoint(tmp_path / "last.ckpt"))
    run.point("best", open_checkpoint(tmp_path / "checkpoint-3"))
    pin(open_checkpoint(tmp_path / "checkpoint-3"), True)
    remove(tmp_path / "checkpoint-3")  # it is pinned
    assert names(tmp_path) >= {"checkpoint-3", "last.ckpt", "latest", "best"}
    assert run.target() == run.target("best") == "checkpoint-3/global_step2"
    pin(open_checkpoint(tmp_path / "checkpoint-3"), False)
    remove(tmp_path / "checkpoint-3")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "last.ckpt", "latest"}
    assert run.target() == "checkpoint-2/global_step2"
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("checkpoint-2")
    run.point("latest", open_checkpoint(tmp_path / "last.ckpt"))
    remove(tmp_path / "last.ckpt")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "latest"}
    assert run.target() == "checkpoint-2/global_step2"


def replace_folder_by_link(final: Path, link: Path) -> None:
    """As ``ModelCheckpoint._link_checkpoint``."""
    final.rmdir()
    final.symlink_to(link.name)


def test_what_is_pinned_or_being_read_is_not_removed(turned: Path) -> None:
    found = {"step=1.ckpt", "step=2.ckpt", "step=4.ckpt", "latest"}  # 3 was removed
    assert names(turned / "kept") == found
    assert Run(turned / "kept").target() == "step=4.ckpt/checkpoint"


def test_a_checkpoint_that_is_not_whole_is_refused_by_name(turned: Path) -> None:
    run, said = turned / "out", told(turned)
    whole = f"the newest committed one is {run}/step=3.ckpt"
    assert said["torn"].endswith(
        f"{run}/step=4.ckpt is not whole: manifest.json lists "
        f"checkpoint/mp_rank_00_model_states.pt: {sizes(run)}; {whole}"
    )
    assert f"{run}/foreign.ckpt has no manifest.json, and is not whole: " in said["foreign"]
    assert "the optimizer files of rank 1" in said["foreign"]
    assert said["foreign"].endswith(f"; {whole}; load_foreign=True loads it anyway")


def test_one_without_a_manifest_is_loaded_where_it_is_complete_and_that_was_not_ruled_out(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    path = of_lightning(tmp_path)
    take = partial(require_whole, path, says=True)
    take(load_foreign=False, committed_only=False)
    assert f"{path} is complete, not committed (written by Lightning with Deep" in logged()
    with pytest.raises(CheckpointError, match=r"committed_only=True .* nothing in .*--adopt comm"):
        take(load_foreign=True, committed_only=True)

    next(path.rglob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"is not whole: .*rank 1.*load_foreign=True loads"):
        take(load_foreign=False, committed_only=False)
    take(load_foreign=True, committed_only=False)
    assert "is loaded all the same (load_foreign=True): " in logged()

    adoption.commit(of_lightning(tmp_path / "other"))
    take = partial(require_whole, tmp_path / "other/epoch=0-step=2.ckpt", says=True)
    take(load_foreign=False, committed_only=True)
    assert not logged()


def sizes(run: Path) -> str:
    listed = manifest.read(run / "step=4.ckpt").files["checkpoint/mp_rank_00_model_states.pt"]
    return f"{listed.size} bytes expected, found 1000"


def test_ranks_that_would_load_different_checkpoints_are_stopped(turned: Path) -> None:
    run = turned / "out"
    assert told(turned)["different"] == (
        f"load_checkpoint failed on rank 1: it loads {run}/step=2.ckpt, rank 0 loads "
        f"{run}/step=1.ckpt; name one checkpoint"
    )


def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert "SIGKILL" in torchrun(WORKER, tmp_path, "dies", 3, limit=LIMIT, code=1)
    run = Run(tmp_path / "out")
    assert [(c.name, c.why) for c in run.checkpoints()] == [("step=1.ckpt", None)]
    assert run.target() == "step=1.ckpt/checkpoint"
    assert names(run.path) <= {"step=1.ckpt", "latest", ".step=2.ckpt.saving"}
    assert convert(run.path, tmp_path / "model")
