"""Model files of another save, whose values are not those of the optimizer's states."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, run
from stock_checkpoints import change_weights, of_engine, trainers, with_model_of_another

import ckpt
from ckpt.runs.foreign import value_samples
from ckpt.runs.states import listing
from ckpt.runs.states.status import statuses_of
from converters.errors import CheckpointError

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return with_model_of_another(tmp_path / "out/checkpoint-2")


@pytest.mark.parametrize(
    "command", [["reshard", "--world-size", "1"], ["to-universal"], ["to-dcp"], ["to-fp32"]]
)
def test_no_command_makes_another_checkpoint_of_it(
    command: list[str], mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*command, mixed, "-o", tmp_path / "new", code=1)
    message = capsys.readouterr().err
    assert "mp_rank_00_model_states.pt holds other values of " in message
    assert "--no-verify" in message
    assert not (tmp_path / "new").exists()

    run(*command, mixed, "-o", tmp_path / "new", "--no-verify")


def test_no_look_calls_it_complete(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("ls", mixed.parent)
    assert "incomplete: global_step2/mp_rank_00_model_states.pt" in capsys.readouterr().out
    run("show", mixed)
    assert "incomplete: global_step2/mp_rank_00_model_states.pt" in capsys.readouterr().out
    for command in (["latest"], ["verify"]):
        run(*command, mixed.parent, code=1)
        assert "mp_rank_00_model_states.pt holds other values of " in "".join(capsys.readouterr())
    for path in (mixed.parent, mixed):
        with pytest.raises(CheckpointError, match="holds other values of "):
            ckpt.find(path)


def test_a_list_compares_the_values_of_the_newest(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [mixed, *(mixed.with_name(f"checkpoint-{step}") for step in (3, 4))]
    for folder in folders[1:]:
        shutil.copytree(SOURCE, folder)
    compared: list[Path] = []
    monkeypatch.setattr(
        value_samples, "require_alike", lambda checkpoint, path: compared.append(path)
    )
    trainers(mixed.with_name("checkpoint-5"), 5)  # which has no states of DeepSpeed
    run("to-universal", folders[-1])
    statuses_of(listing.checkpoints_in(mixed.parent), wait=False)
    assert compared == [folders[-1]]


def test_whoever_changed_the_weights_commits_them_and_the_manifest_says_so(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("doctor", mixed.parent, "--adopt", "--one-save", code=1)
    assert "is a run, not a checkpoint" in capsys.readouterr().err
    run("doctor", mixed, "--adopt", "--one-save", "--dry-run")
    assert not (mixed / "manifest.json").exists()
    run("doctor", mixed, "--adopt", "--one-save")
    assert "the manifest says that --one-save was given" in capsys.readouterr().err

    assert ckpt.find(mixed.parent) == str(mixed)
    doubt = "--one-save, though global_step2/mp_rank_00_model_states.pt holds other"
    for command in (["ls"], ["verify"], ["verify", "--data"]):
        run(*command, mixed.parent)
        assert doubt in capsys.readouterr().out, command
    run("reshard", mixed, "--world-size", "1", "-o", tmp_path / "new")


def test_a_save_dir_gets_no_manifest_that_could_say_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_engine(tmp_path / "out")
    run("doctor", tmp_path / "out", "--adopt", "--one-save", code=1)
    assert "is a save_dir with tags of its own" in capsys.readouterr().out


def test_it_is_not_adopted(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--adopt", "--dry-run"], ["--adopt"]):
        run("doctor", mixed.parent, *options, code=1)
        assert "mp_rank_00_model_states.pt holds other values of " in capsys.readouterr().out
    assert not (mixed / "manifest.json").exists()


def test_verify_compares_values_where_it_reads_data(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("verify", mixed, "--data", code=1)
    assert "mp_rank_00_model_states.pt holds other values of " in capsys.readouterr().out


def test_a_damaged_record_is_not_told_as_another_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    path = folder / "global_step2/mp_rank_00_model_states.pt"
    name, tensor = max(
        torch.load(path, weights_only=False)["module"].items(), key=lambda item: item[1].numel()
    )
    record = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(record[:64]) + 1] ^= 0x40
    path.write_bytes(data)
    run("reshard", folder, "--world-size", "1", "-o", tmp_path / "new", code=1)
    assert f"{path} is damaged: its " in capsys.readouterr().err, name


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("pipelines-and-experts/pipeline-zero1", "layer_01-model_states.pt"),
        (
            "pipelines-and-experts/moe-zero2-blocks",
            "layer_0_expert_1_mp_rank_00_model_states.pt",
        ),
        ("parallel/tp_qwen3_frozen_z2_w4", "mp_rank_01_model_states.pt"),
    ],
)
def test_those_of_model_parallel_ranks_are_found_too(
    fixture: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / fixture, tmp_path / "out")
    run("verify", tmp_path / "out", "--data")
    change_weights(tmp_path / "out/global_step2" / name)
    capsys.readouterr()
    for command in (["ls"], ["verify", "--data"]):
        run(*command, tmp_path / "out", code=int("verify" in command))
        assert f"incomplete: {name} holds other values of " in capsys.readouterr().out
