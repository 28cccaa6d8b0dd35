"""State files that were written anew at the same size since the checkpoint was committed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from oracles import run
from run_folders import real

COMMANDS = [["reshard", "--world-size", "1"], ["to-universal"], ["to-dcp"]]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A state file of a committed checkpoint with other values, of which no copy tells."""
    folder = real(tmp_path / "out", 2).folder
    path = next(folder.glob("global_step2/*zero_pp_rank_1_*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["exp_avg"].mul_(1.5)
    nbytes = path.stat().st_size
    torch.save(content, path)
    assert path.stat().st_size == nbytes
    return path


def test_verify_says_so_without_reading_every_byte(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("verify", changed.parents[2], code=1)
    assert f"{changed.name}: its zip directory has changed" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_not_written_on(
    command: list[str], changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*command, changed.parents[1], "-o", tmp_path / "new", code=1)
    message = capsys.readouterr().err
    assert f"{changed} was changed since the checkpoint was committed" in message
    assert "--no-verify" in message and not (tmp_path / "new").exists()
    run(*command, changed.parents[1], "-o", tmp_path / "new", "--no-verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_copy_is_accused_of_nothing(command: list[str], tmp_path: Path) -> None:
    """Nor is a file whose times alone changed, as by ``touch`` or another owner."""
    folder = real(tmp_path / "out", 2).folder
    shutil.copytree(folder, tmp_path / "copies/checkpoint-2", copy_function=shutil.copyfile)
    for path in (tmp_path / "copies").rglob("*.*"):
        times = 2 * [(tmp_path / "copies/checkpoint-2/manifest.json").stat().st_mtime + 60]
        os.utime(path, tuple(times) if path.name != "manifest.json" else None)
    run("verify", tmp_path / "copies")
    run(*command, tmp_path / "copies/checkpoint-2", "-o", tmp_path / "new")


def test_another_file_than_a_zip_is_read_where_its_times_are_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = real(tmp_path, 2).folder / "trainer_state.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"global_step": 2', '"global_step": 4'), "utf-8")
    later = path.stat().st_mtime + 60
    os.utime(path, (later, later))
    run("verify", tmp_path, code=1)
    assert "trainer_state.json: sha256:" in capsys.readouterr().out
