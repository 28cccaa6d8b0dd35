"""An output never lies inside of what it is made of, nor inside of any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from oracles import FIXTURES, run
from run_folders import commit, real

from ckpt.hub import pull
from ckpt.runs import user_paths
from ckpt.runs.run import Run
from converters.errors import CheckpointError

SOURCE = FIXTURES / "zero2-bf16-w2"
COMMANDS = {
    "to-fp32": ["to-fp32"],
    "reshard": ["reshard", "--world-size", "3"],
    "to-universal": ["to-universal"],
}


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> list[str]:
    """The words of a command that writes a folder."""
    return COMMANDS[request.param]


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--overwrite"]])
def test_no_command_writes_into_its_source(
    command: list[str], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "save"
    shutil.copytree(SOURCE, source)
    (tmp_path / "link").symlink_to("save")
    (tmp_path / "elsewhere").symlink_to("save/global_step2")
    before = everything(tmp_path)
    inner = (source / "new", source / "global_step2/new.ckpt", tmp_path / "link/a/b")
    for output in (*inner, tmp_path / "elsewhere/new", source / "global_step2/inner"):
        run(*command, source, "-o", output, *options, code=1)
        assert f"{output} lies inside of " in capsys.readouterr().err
    run(*command, tmp_path / "link", "-o", source / "new", *options, code=1)
    assert everything(tmp_path) == before


def test_from_universal_and_collect_write_none_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-universal", SOURCE, "-o", tmp_path / "u")
    run("from-universal", tmp_path / "u", "--world-size", "1", "-o", tmp_path / "u/one", code=1)
    assert "lies inside of" in capsys.readouterr().err

    parts = []
    for node in (0, 1):
        folder = tmp_path / f"node{node}/checkpoint-2"
        shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", folder)
        parts.append(commit(folder, 2, node=node, nodes=2, save="ab" * 16).folder)
    run("collect", *parts, "-o", parts[0] / "joined", "--dry-run", code=1)
    assert "lies inside of" in capsys.readouterr().err


def test_nothing_is_pulled_into_a_checkpoint(tmp_path: Path) -> None:
    folder = real(tmp_path, 2).folder
    pytest.importorskip("huggingface_hub")
    with pytest.raises(CheckpointError, match="inside of the checkpoint"):
        pull.plan("org/name", folder / "model")


def test_a_run_is_not_a_checkpoint_and_holds_outputs(tmp_path: Path) -> None:
    checkpoint = real(tmp_path / "out", 2)
    Run(tmp_path / "out").point("latest", checkpoint)
    for source, name in ((tmp_path / "out", "model"), (checkpoint.folder, "other")):
        run("to-fp32", source, "-o", tmp_path / "out" / name)


def test_a_file_of_another_program_makes_no_checkpoint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "checkpoint-1").mkdir()
    user_paths.require_outside(tmp_path / "checkpoint-1/inner/new")


def test_of_a_tag_in_a_checkpoint_the_output_is_beside_the_checkpoint(tmp_path: Path) -> None:
    tag = real(tmp_path, 2).folder / "global_step2"
    run("to-fp32", tag)
    assert (tmp_path / "checkpoint-2-fp32/conversion.json").is_file()


def test_no_output_replaces_what_a_training_saved(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    shutil.copytree(SOURCE, tmp_path / "checkpoint-4")
    shutil.copytree(SOURCE, tmp_path / "other/best")
    shutil.copytree(SOURCE / "global_step2", tmp_path / "tags/global_step2")
    before = everything(tmp_path)

    for name in ("checkpoint-4", "other", "other/best", "tags", "tags/global_step2"):
        run(*command, tmp_path / "checkpoint-2", "-o", tmp_path / name, "--overwrite", code=1)
        assert "name another folder with -o" in capsys.readouterr().err
    assert everything(tmp_path) == before

    for options in ([], ["--overwrite"]):  # what ckpt made is made again
        run(*command, tmp_path / "checkpoint-2", "-o", tmp_path / "mine", *options)


@pytest.mark.parametrize("options", [["--overwrite"], ["--overwrite", "--dry-run"]])
def test_a_folder_with_files_of_the_user_is_not_replaced(
    command: list[str], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one of a model, where they lie beside the weights or deep in it."""
    run("to-fp32", SOURCE, "-o", tmp_path / "model")
    run(*command, SOURCE, "-o", tmp_path / "again")
    for folder in ("project", "model", "again"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "train.py").write_text("print()")
        (tmp_path / folder / "data/corpus.jsonl").write_text("{}")
    (tmp_path / "only-a-card").mkdir()
    (tmp_path / "only-a-card/README.md").write_text("mine")
    before = everything(tmp_path)
    capsys.readouterr()

    for folder in ("project", "model", "again"):
        run(*command, SOURCE, "-o", tmp_path / folder, *options, code=1)
        message = capsys.readouterr().err
        assert "not made by ckpt: data/corpus.jsonl, train.py; the output would" in message
    run(*command, SOURCE, "-o", tmp_path / "only-a-card", *options, code=1)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", [".", ".."])
def test_the_working_directory_is_not_replaced(
    command: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "project/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ("project" if name == "." else "project/inner"))
    run(*command, SOURCE, "-o", tmp_path / "project", "--overwrite", code=1)
    assert "the working directory, which the output would replace" in capsys.readouterr().err
    run(*command, SOURCE, "-o", name, "--overwrite", code=1)
    assert everything(tmp_path) == {tmp_path / "project", tmp_path / "project/inner"}


def test_a_git_work_tree_is_not_replaced(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", SOURCE, "-o", tmp_path / "model")
    (tmp_path / "model/.git").mkdir()
    run(*command, SOURCE, "-o", tmp_path / "model", "--overwrite", code=1)
    assert "is a git work tree" in capsys.readouterr().err


def test_what_a_model_has_and_what_ckpt_made_is_replaced(
    command: list[str], tmp_path: Path
) -> None:
    """A downloaded model, and outputs of other numbers of ranks and of other commands."""
    model = tmp_path / "model"
    (model / ".cache/huggingface/download").mkdir(parents=True)
    (model / ".cache/huggingface/download/config.json.metadata").touch()
    for name in ("config.json", "tokenizer.json", "README.md", "pytorch_model.bin"):
        (model / name).write_text("{}")
    run("reshard", SOURCE, "--world-size", "5", "-o", tmp_path / "five")
    run("to-universal", SOURCE, "-o", tmp_path / "universal")
    run("to-dcp", SOURCE, "-o", tmp_path / "dcp", "--layout", "accelerate")
    for name in ("model", "five", "universal", "dcp"):
        run(*command, SOURCE, "-o", tmp_path / name, "--overwrite")


def test_a_rewritten_folder_that_a_training_saved_into_is_not_replaced(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("reshard", SOURCE, "--world-size", "1", "-o", tmp_path / "one")
    shutil.copytree(SOURCE / "global_step2", tmp_path / "one/global_step8")
    run(*command, SOURCE, "-o", tmp_path / "one", "--overwrite", code=1)
    assert "global_step8/" in capsys.readouterr().err
