"""Paths are taken as text or ``os.PathLike``, sizes as "5GB", and a URL is never a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from oracles import FIXTURES, run

import ckpt
from ckpt.runs.run import Run
from ckpt.weights.conversion import convert
from converters import detect, zero
from converters.errors import CheckpointError

SOURCE = FIXTURES / "zero2-bf16-w2"


class Somewhere(os.PathLike[str]):
    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


DOORS: dict[str, Callable[[Any], object]] = {
    "zero.read": zero.read,
    "detect.detect": detect.detect,
    "detect.read": detect.read,
    "convert.plan": convert.plan,
    "ckpt.open": ckpt.open,
    "Run": lambda path: Run(path).path,
    "reshard.plan": lambda path: ckpt.reshard.plan(path, 1),
    "universal.plan_to": ckpt.universal.plan_to,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [str, Somewhere])
def test_a_path_may_be_text_or_path_like(door: str, kind: Callable[[Path], Any]) -> None:
    assert DOORS[door](kind(SOURCE)) is not None


@pytest.mark.parametrize("door", DOORS)
def test_a_url_is_refused_as_it_was_written(door: str) -> None:
    with pytest.raises(CheckpointError, match="s3://bucket/run is a URL") as raised:
        DOORS[door]("s3://bucket/run")
    assert raised.value.kind == "unsupported"


@pytest.mark.parametrize(
    "words",
    [
        ("show", "s3://bucket/run"),
        ("ls", "s3://bucket/run"),
        ("to-fp32", SOURCE, "-o", "s3://bucket/run"),
        ("reshard", SOURCE, "--world-size", "1", "-o", "s3://bucket/run"),
    ],
    ids=lambda words: str(words[0]),
)
def test_a_command_makes_no_folder_of_a_url(
    words: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*words, code=1)
    assert "s3://bucket/run is a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["pin", "unpin", "slim", "verify", "push"])
def test_a_command_on_local_files_says_the_same_of_every_url(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, "s3://bucket/run", *(["a/b"] if command == "push" else []), code=1)
    expected = (
        "s3://bucket/run is a URL, and this has to be a local path: download it first: "
        "aws s3 cp --recursive s3://bucket/run DIR\n"
    )
    assert capsys.readouterr().err == f"ckpt: {expected}"


def test_an_output_under_a_url_is_told_to_be_local(capsys: pytest.CaptureFixture[str]) -> None:
    run("to-fp32", SOURCE, "-o", "s3://bucket/run", code=1)
    assert capsys.readouterr().err.endswith(": name a local folder, and upload that\n")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("prefix", ["file://", "file://localhost", "FILE://"])
def test_a_url_of_a_local_file_is_its_path(door: str, prefix: str, tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    shutil.copytree(SOURCE, folder)
    assert DOORS[door](f"{prefix}{quote(str(folder))}") is not None


def test_a_size_may_be_text(tmp_path: Path) -> None:
    small = convert.plan(SOURCE, tmp_path / "a", max_shard_size="1kB")
    assert len(small.plan.shards) > 1
    with pytest.raises(CheckpointError, match="max_shard_size: 'many' is not a size"):
        convert.plan(SOURCE, max_shard_size="many")


@pytest.mark.parametrize("wrong", [{"dtype": "fp31"}, {"format": "gguf"}, {"tied": "untied"}])
def test_an_argument_that_is_none_of_its_values_is_named(wrong: dict[str, Any]) -> None:
    (argument,) = wrong
    with pytest.raises(CheckpointError, match=f"{argument} is .*; expected one of"):
        convert.plan(SOURCE, **wrong)


@pytest.mark.parametrize("world_size", ["4", 0, True])
def test_a_number_of_ranks_is_one(world_size: Any) -> None:
    with pytest.raises(CheckpointError, match="expected a number of ranks"):
        ckpt.reshard.plan(SOURCE, world_size)


@pytest.mark.parametrize("door", [*DOORS, "ckpt.find"])
def test_an_empty_path_is_not_the_current_folder(door: str) -> None:
    call = DOORS.get(door, ckpt.find)
    with pytest.raises(CheckpointError, match="the path is empty, perhaps of a variable"):
        call("")
