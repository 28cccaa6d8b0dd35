"""A dry run says no where the command says no, in the same words, and makes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from oracles import FIXTURES, run

CHECKPOINT = FIXTURES / "zero2-bf16-w2"
COMMANDS = {
    "to-fp32": ["to-fp32"],
    "reshard": ["reshard", "--world-size", "3"],
    "to-universal": ["to-universal"],
}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> list[str]:
    """The words of a command that makes a folder of a checkpoint."""
    return COMMANDS[request.param]


def test_an_output_that_exists_is_refused_by_the_dry_run_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.safetensors").touch()

    errors = []
    for options in ([], ["--dry-run"]):
        run(*command, CHECKPOINT, "-o", output, *options, code=1)
        errors.append(capsys.readouterr().err)
    assert "exists already; --overwrite replaces it" in errors[0]
    assert errors[0] == errors[1]

    run(*command, CHECKPOINT, "-o", output, "--dry-run", "--overwrite")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(output) == ["model.safetensors"]


def test_an_output_that_cannot_be_made_is_refused_by_the_dry_run_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        run(*command, CHECKPOINT, "-o", output, "--dry-run", code=1)
        assert "choose another folder with -o" in capsys.readouterr().err
        run(*command, CHECKPOINT, "-o", output, code=1)
        capsys.readouterr()

    run(*command, CHECKPOINT, "-o", tmp_path / "new" / "out", "--dry-run")
    assert os.listdir(tmp_path) == ["file"]
