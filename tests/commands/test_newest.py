"""``--last``: the newest checkpoint of a run that is committed or complete, and which it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import stock_checkpoints
import torch
from oracles import FIXTURES, run
from run_folders import real, small

import ckpt
from ckpt.hub import select
from ckpt.runs.run import Run
from ckpt.runs.states import listing
from ckpt.runs.states.newest import newest_at
from ckpt.runs.states.status import CheckpointState, statuses_of
from ckpt.saving.commit import filesystem_trials
from converters.errors import CheckpointError

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"


def stock(run_folder: Path, step: int) -> Path:
    """A Trainer's checkpoint without a manifest, of which nothing changed lately."""
    folder = stock_checkpoints.stock(run_folder, step)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1e9, 1e9))
    return folder


def test_a_run_without_last_names_its_checkpoints_and_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 2), stock(tmp_path, 4)
    for command in ("to-fp32", "show"):
        run(command, tmp_path, code=1)
        assert capsys.readouterr().err == (
            f"ckpt: {tmp_path} is a run, not a checkpoint; it holds the checkpoints checkpoint-2, "
            f"checkpoint-4: name one of them, such as ckpt {command} {tmp_path / 'checkpoint-4'}, "
            "or take the newest with --last\n"
        )
    for call in (ckpt.open, ckpt.to_fp32):
        with pytest.raises(CheckpointError, match=r"or take the newest with last=True$"):
            call(tmp_path)


def test_a_link_to_a_disk_that_is_not_mounted_is_named_wherever_it_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    stock(tmp_path, 2)
    (tmp_path / "checkpoint-4").symlink_to("../disk/checkpoint-4")
    reason = "it is a link to ../disk/checkpoint-4, which is not there"
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")
    assert f"passed over {tmp_path / 'checkpoint-4'}: {reason}" in caplog.text

    (tmp_path / "latest").write_text("checkpoint-2/global_step2")
    for arguments, code in (("ls", 0), ("verify", 1), ("doctor", 1), ("latest", 0)):
        run(*arguments.split(), tmp_path, code=code)
        printed = capsys.readouterr()
        assert reason in printed.out + printed.err
    run("doctor", tmp_path, "--adopt", "--dry-run", code=1)
    run("doctor", tmp_path, "--fix", code=1)
    assert os.readlink(tmp_path / "checkpoint-4") == "../disk/checkpoint-4"

    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"none that can be resumed from .*{reason}"):
        ckpt.find(tmp_path)


def test_a_run_that_is_a_link_to_nowhere_is_no_new_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").symlink_to("/no-disk/run")
    for path in (tmp_path / "run", tmp_path / "run/inner"):
        with pytest.raises(CheckpointError, match="is a link to /no-disk/run, which is not there"):
            ckpt.find(path)
    with (
        pytest.raises(CheckpointError, match=r"is not there; bring that back \(mount its disk\)"),
        filesystem_trials.tried(tmp_path / "run", "making a file"),
    ):
        (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    run("to-fp32", SOURCE, "-o", tmp_path / "run/inner", code=1)
    assert "is a link to /no-disk/run, which is not there" in capsys.readouterr().err


def test_last_takes_the_newest_and_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 2), stock(tmp_path, 10)
    run("to-fp32", tmp_path, "--last")
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'checkpoint-10-fp32'}\n")
    assert printed.err == (
        f"ckpt: the newest checkpoint of {tmp_path} is {tmp_path / 'checkpoint-10'} "
        "(complete, not committed)\n"
    )
    run("show", tmp_path, "--last", "--json")
    assert json.loads(capsys.readouterr().out)["path"] == str(
        tmp_path / "checkpoint-10/global_step2"
    )
    with ckpt.open(tmp_path, "np", last=True) as opened:
        assert opened.path == tmp_path / "checkpoint-10"
    model = ckpt.to_fp32(tmp_path, last=True, overwrite=True)
    assert model.path == tmp_path / "checkpoint-10-fp32"


def test_what_is_not_whole_is_passed_over_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real(tmp_path, 2)
    torn = stock(tmp_path, 4)
    state = torn / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 2', '"global_step": 4'))
    (torn / "scheduler.pt").unlink()
    choice = newest_at(tmp_path, "x")
    assert choice.checkpoint.name == "checkpoint-2"
    assert choice.state is CheckpointState.COMMITTED
    assert choice.remark.endswith(f"is {tmp_path / 'checkpoint-2'} (committed)")
    assert f"passed over {torn}: " in caplog.text and "has no scheduler.pt" in caplog.text


def test_weights_alone_are_the_newest_only_where_no_training_goes_on(tmp_path: Path) -> None:
    real(tmp_path, 2)
    small(tmp_path, 4, tier="weights")
    for full, name in ((True, "checkpoint-2"), (False, "checkpoint-4")):
        assert newest_at(tmp_path, "x", full).checkpoint.name == name


def test_a_latest_that_leads_somewhere_goes_on_working(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2)
    Run(tmp_path).point("latest", checkpoint)
    run("to-fp32", tmp_path, "--dry-run", "-o", tmp_path / "m")
    ckpt.open(tmp_path, "np").lock.release()


def test_a_latest_that_leads_to_an_older_one_says_which_is_newer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path).point("latest", real(tmp_path, 2))
    real(tmp_path, 4)
    torn = shutil.copytree(SOURCE, tmp_path / "checkpoint-8")
    (torn / "trainer_state.json").unlink()
    sentence = (
        f"the file latest of {tmp_path} leads to {tmp_path / 'checkpoint-2'}; "
        f"{tmp_path / 'checkpoint-4'} is newer (committed), name it to take that one"
    )
    run("show", tmp_path)
    assert capsys.readouterr().err == f"ckpt: {sentence}\n"
    run("to-fp32", tmp_path, "-o", tmp_path / "m", "--dry-run")
    assert capsys.readouterr().err == f"ckpt: {sentence}\n"

    caplog.clear()
    ckpt.open(tmp_path, "np").lock.release()
    ckpt.to_fp32(tmp_path, tmp_path / "m")
    assert caplog.messages == [sentence] * 2

    Run(tmp_path).point("latest", Run(tmp_path).newest())
    run("show", tmp_path)
    assert capsys.readouterr().err == ""


def test_doctor_points_no_latest_at_an_older_one_than_a_resume_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    folder = stock(tmp_path, 8)
    (folder / "trainer_state.json").write_text('{"global_step": 8}')
    (tmp_path / "latest").write_text("checkpoint-99/global_step99")
    run("doctor", tmp_path, "--fix", code=1)
    assert f"ckpt doctor {folder} --adopt commits it" in capsys.readouterr().out
    assert (tmp_path / "latest").read_text() == "checkpoint-99/global_step99"
    run("latest", tmp_path)
    sentence = f"names 'checkpoint-99/global_step99', which is not there; {folder} is the newest"
    assert sentence in capsys.readouterr().err
    run("doctor", folder, "--adopt")
    run("doctor", tmp_path, "--fix")
    assert (tmp_path / "latest").read_text() == "checkpoint-8/global_step2"


def test_prune_calls_none_the_newest_where_a_newer_one_is_not_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    run("prune", tmp_path, "--keep-last", "1", "--dry-run")
    assert "\tnewest, newest full, last 1\n" in capsys.readouterr().out
    folder = stock(tmp_path, 8)
    (folder / "trainer_state.json").write_text('{"global_step": 8}')
    run("prune", tmp_path, "--keep-last", "1", "--dry-run")
    printed = capsys.readouterr()
    assert "\tnewest committed, newest full committed, last 1\n" in printed.out
    assert "1 checkpoint is complete but not committed" in printed.err


def test_a_slimmed_run_is_no_fresh_start_and_every_command_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 2).folder
    Run(tmp_path).point("latest", Run(tmp_path).newest())
    run("slim", folder, "--force")
    capsys.readouterr()

    with pytest.raises(CheckpointError, match="holds no states any more") as refusal:
        ckpt.find(tmp_path)
    assert f"(from_pretrained of {folder})" in str(refusal.value)
    run("latest", tmp_path, code=1)
    assert "holds no states any more" in capsys.readouterr().err
    for command in ("show", "to-fp32"):
        run(command, tmp_path, code=1)
        assert f"{tmp_path / 'latest'} names checkpoint-2, which has weights only" in (
            capsys.readouterr().err
        )
    run("doctor", tmp_path)
    assert "latest names checkpoint-2, which has weights only" in capsys.readouterr().err
    run("latest", tmp_path, "--set", "checkpoint-2", code=1)
    assert "has weights only, and no training goes on from them" in capsys.readouterr().err
    run("latest", tmp_path, "--set", "checkpoint-2", "--best")

    small(tmp_path / "weights", 2, tier="weights")  # no training ever went on from it
    assert ckpt.find(tmp_path / "weights") is None


def test_beside_a_slimmed_newest_a_complete_one_is_taken_and_every_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = stock(tmp_path, 2), real(tmp_path, 4)
    Run(tmp_path).point("latest", newest)
    for options in (["--dry-run"], []):
        run("slim", newest.folder, "--force", *options)
        assert "a job that starts again takes another one, or stops" in capsys.readouterr().err
    assert ckpt.find(tmp_path) == str(older)

    run("doctor", tmp_path)
    printed = capsys.readouterr().err
    assert "has weights only, so that a resume takes another one" in printed
    assert "stops and says so" not in printed

    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, code=1)
    assert "latest: names 'checkpoint-4', which has weights only" in capsys.readouterr().out


def test_of_a_slimmed_newest_the_older_full_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = real(tmp_path, 2), real(tmp_path, 4)
    Run(tmp_path).point("latest", newest)
    run("slim", newest.folder, "--force")
    assert ckpt.find(tmp_path) == str(older.folder)
    assert (tmp_path / "latest").read_text() == "checkpoint-2/global_step2"
    capsys.readouterr()
    run("latest", tmp_path)
    printed = capsys.readouterr()
    assert printed.out == f"{older.folder}\n"
    assert "checkpoint-4: weights only since it was slimmed" in printed.err


def test_last_asks_for_a_run_that_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock(tmp_path / "out", 2)
    run("show", folder, "--last", code=1)
    assert "is a checkpoint, not a run" in capsys.readouterr().err
    run("show", tmp_path / "out", "--last", "--tag", "global_step2", code=1)
    assert "--tag global_step2 does not go with --last" in capsys.readouterr().err
    run("show", tmp_path / "none", "--last", code=1)
    assert "does not exist; expected a run of DeepSpeed checkpoints" in capsys.readouterr().err
    (folder / "trainer_state.json").unlink()
    run("show", tmp_path / "out", "--last", code=1)
    line = capsys.readouterr().err
    assert "is committed or complete (checkpoint-2: it has no manifest.json" in line
    assert "trainer_state.json" in line and line.endswith(f"; see ckpt ls {tmp_path / 'out'}\n")


def test_a_function_with_last_names_the_run_alone(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2).folder
    for call in (ckpt.open, ckpt.to_fp32):
        with pytest.raises(CheckpointError) as caught:
            call(checkpoint, last=True)
        assert str(caught.value).endswith(f"name the folder that it lies in: {tmp_path}")


def test_show_says_the_step_and_the_state_of_a_slimmed_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 2).folder
    run("slim", folder, "--force")
    capsys.readouterr()
    run("show", folder, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["step"]) == ("committed", 2)


def test_a_copy_of_an_older_checkpoint_is_adopted_and_gives_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 1), stock(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "best")
    for path in (tmp_path / "best").rglob("*"):
        os.utime(path, (2e9 - 1e8, 2e9 - 1e8))  # copied later, without its times

    run("doctor", tmp_path, "--adopt", "--now")
    capsys.readouterr()
    run("latest", tmp_path)
    assert capsys.readouterr().out == f"{tmp_path / 'checkpoint-2'}\n"
    run("prune", tmp_path, "--others", "--dry-run", "--json")
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    assert {Path(entry["path"]).name for entry in entries if entry["kept"]} == {
        "best",
        "checkpoint-1",
        "checkpoint-2",
    }


def test_a_state_of_the_engine_alone_is_not_taken_beside_the_trainers_checkpoints(
    tmp_path: Path,
) -> None:
    checkpoint = stock(tmp_path, 2)
    shutil.copytree(SOURCE / "global_step2", tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step2")
    assert ckpt.find(tmp_path) == str(checkpoint)


def test_a_save_dir_in_a_run_is_its_checkpoint_but_not_where_a_trainer_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_dir = tmp_path / "epoch1"  # as a loop saves that names a folder for each epoch
    shutil.copytree(SOURCE / "global_step2", save_dir / "global_step2")
    (save_dir / "latest").write_text("global_step2")
    assert ckpt.find(tmp_path) == str(save_dir)

    checkpoint = stock(tmp_path, 1)
    assert ckpt.find(tmp_path) == str(checkpoint)
    assert f"passed over {save_dir}: it has no trainer_state.json, without which" in caplog.text
    assert ckpt.find(save_dir) == str(save_dir)


def test_prune_asks_for_a_metric_that_checkpoints_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    run("prune", tmp_path, "--keep-best", "acc:max:1", "--dry-run", code=1)
    assert "no checkpoint has the metric acc" in capsys.readouterr().err


def test_the_best_of_complete_ones_is_chosen_by_what_the_trainer_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, loss in ((2, 0.5), (4, 0.75)):
        folder = stock_checkpoints.stock(tmp_path, step, [{"step": step, "eval_loss": loss}])
        path = folder / "trainer_state.json"
        best = {"best_model_checkpoint": "/elsewhere/out/checkpoint-2"}
        path.write_text(json.dumps(json.loads(path.read_text()) | best))
    choice = select.chosen(tmp_path, ("eval_loss", "min", 1))
    assert choice.checkpoint.name == "checkpoint-2" and not choice.committed
    assert choice.remark is not None and "complete, not committed" in choice.remark
    run("latest", tmp_path, "--best")
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "checkpoint-2") and "not committed" in said.err
    run("prune", tmp_path, "--keep-best", "eval_loss:min", "--dry-run", code=1)
    assert f"ckpt doctor {tmp_path} --adopt commits them" in capsys.readouterr().err


def test_files_of_two_steps_are_not_complete(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path, 2)
    (checkpoint / "global_step2").rename(checkpoint / "global_step1")  # as DeepSpeed names it
    (checkpoint / "latest").write_text("global_step1")
    path = checkpoint / "global_step1/mp_rank_00_model_states.pt"
    for steps, values, is_complete in ((1, 0.0, True), (1, 1.0, False)):
        state = torch.load(path, weights_only=False)
        state["global_steps"] = steps
        for tensor in state["module"].values():
            tensor += values
        torch.save(state, path)
        os.utime(path, (1e9, 1e9))
        (status,) = statuses_of(listing.checkpoints_at(checkpoint), False)
        assert status.complete == is_complete
    assert "holds files of two saves" in status.description


def test_a_latest_that_leads_nowhere_is_no_fresh_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = tmp_path / "out"
    model = run_folder / "checkpoint-3"
    run_folder.mkdir()
    for text in ("global_step9", "checkpoint-9/global_step9", "", "x" * 300):
        (run_folder / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="latest to begin a new training") as caught:
            ckpt.find(run_folder)
        assert repr(text) in str(caught.value) or f"{run_folder}/latest is empty" in str(caught)
        run("latest", run_folder, code=1)
        assert f"delete {run_folder}/latest" in capsys.readouterr().err
        run("doctor", run_folder, code=1)
        finding = "names no checkpoint" if not text else f"{text!r}, which is not there"
        assert finding in capsys.readouterr().out
        model.mkdir(exist_ok=True)  # weights alone are no work to go on from
        for name in ("config.json", "model.safetensors"):
            shutil.copy(FIXTURES / "trainer-zero2/checkpoint-2" / name, model)

    (run_folder / "latest").unlink()
    assert ckpt.find(run_folder) is None

    (run_folder / "latest").write_text("global_step9")
    tag = shutil.copytree(FIXTURES / "zero2-bf16-w2/global_step2", run_folder / "global_step2")
    caplog.clear()
    assert ckpt.find(run_folder) == str(tag)
    assert f"'global_step9', which is not there; {tag} is the newest" in caplog.text


def test_files_of_deepspeed_that_were_left_behind_are_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", tmp_path / "checkpoint-2")
    shutil.rmtree(folder / "global_step2")
    run("ls", tmp_path)
    assert "incomplete: latest names 'global_step2', which is not there" in capsys.readouterr().out


def test_push_says_where_it_takes_newer_weights_than_to_fp32_converts(tmp_path: Path) -> None:
    stock(tmp_path, 2)
    model = tmp_path / "checkpoint-4"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "trainer-zero2/checkpoint-2" / name, model)

    pushed = newest_at(tmp_path, "ckpt push", full=False)
    assert pushed.checkpoint.folder == model
    remark = "newer than the states that ckpt to-fp32 --last converts: name "
    assert f"{remark}{tmp_path}/checkpoint-2" in pushed.remark
    assert newest_at(tmp_path, "ckpt push").checkpoint.folder == tmp_path / "checkpoint-2"
