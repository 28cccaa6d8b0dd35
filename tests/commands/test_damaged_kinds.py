"""No command says of what its reader refuses that ckpt reads it: it quotes the reader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kind_cases import CASES, dcp, touch
from oracles import FIXTURES
from test_detect_commands import COMMANDS, WITHOUT_DRY_RUN

import ckpt
from ckpt.cli.main import main
from converters.detect import detect
from converters.detect.kinds import BY_NAME, KINDS
from converters.errors import CheckpointError

READERS = [kind.name for kind in KINDS if kind.reader is not None]
POINTERS = ("latest", "latest_universal", "manifest.json")
BEYOND = {"to-dcp": (), "verify --data": (), **COMMANDS}
# what takes a folder for a run, and says of it what it lacks as one
ON_RUNS = ("ls", "verify", "verify --data", "latest", "doctor", "doctor --adopt", "prune", "push")


def emptied(name: str, folder: Path) -> Path:
    """A path of a kind whose files have no bytes, but for those that lead to others."""
    path = CASES[name][0](folder)
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in POINTERS:
            file.write_bytes(b"")
    return path


def pointer_alone(folder: Path) -> Path:
    """A partial copy: a file ``latest``, and not the tag that it names."""
    touch(folder, "latest").joinpath("latest").write_text("global_step5")
    return folder


def tag_without_files(folder: Path) -> Path:
    """The same with the tag's folder."""
    (pointer_alone(folder) / "global_step5").mkdir()
    return folder


def without_metadata(folder: Path) -> Path:
    """A folder of DCP whose save did not finish."""
    (dcp(folder) / ".metadata").unlink()
    return folder


def without_rank(folder: Path) -> Path:
    """A checkpoint of DeepSpeed without the states of a rank."""
    shutil.copytree(FIXTURES / "zero2-bf16-w2", folder, dirs_exist_ok=True)
    next(folder.rglob("*rank_1_*optim_states.pt")).unlink()
    return folder


PARTIAL: dict[str, Callable[[Path], Path]] = {
    build.__name__: build
    for build in (pointer_alone, tag_without_files, without_metadata, without_rank)
}


def text_of(command: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints of a path."""
    verb, *options = command.split()
    options += [] if verb in WITHOUT_DRY_RUN else ["--dry-run"]
    with pytest.raises(SystemExit):
        main([verb, str(path), *BEYOND[command], *options])

    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.out + printed.err


def text_of_function(call: str, path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What a function logs of a path, and raises."""
    caplog.clear()
    try:
        ckpt.open(path, "np") if call == "open" else ckpt.find(path)
    except CheckpointError as error:
        return f"{caplog.text}\n{error}"
    return caplog.text


def require_no_claim(text: str, path: Path, what: str) -> None:
    """A sentence on what is read of the kind is not one on what its reader refuses."""
    kind = detect(path).kind
    claim = kind.remedy.partition("{")[0]
    assert kind.is_opened or "ckpt show" in claim
    assert not claim or claim not in text, (what, text)
    assert "is a DeepSpeed checkpoint, not a DeepSpeed checkpoint" not in text, (what, text)


@pytest.mark.parametrize("place", ["alone", "in a run"])
@pytest.mark.parametrize("name", [*READERS, *PARTIAL])
def test_what_its_reader_refuses_is_not_called_readable(
    name: str,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "x" if place == "alone" else tmp_path / "checkpoint-5"
    folder.mkdir()
    path = PARTIAL[name](folder) if name in PARTIAL else emptied(name, folder)
    detection = detect(path)
    assert name in PARTIAL or detection.kind is BY_NAME[name]
    damage = detection.damage
    assert damage is not None

    for command in BEYOND:
        for subject in (path,) if place == "alone" else (path, tmp_path):
            require_no_claim(text_of(command, subject, capsys), path, f"{command} {subject}")
    for call in ("open", "find"):
        require_no_claim(text_of_function(call, path, caplog), path, call)


@pytest.mark.parametrize("name", ["pointer_alone", "without_metadata"])
def test_commands_quote_the_reader_of_a_partial_copy(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = PARTIAL[name](tmp_path)
    damage = str(detect(path).damage)
    for command in BEYOND:
        # which reads others, and two that speak of the file latest itself
        if command not in ("from-universal", "doctor", "latest") or name != "pointer_alone":
            assert damage in text_of(command, path, capsys), command


@pytest.mark.parametrize("name", ["pointer_alone", "without_metadata"])
def test_a_partial_copy_in_a_run_is_said_to_lack_what_it_lacks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = PARTIAL[name](touch(tmp_path / "checkpoint-5"))
    cause = "names 'global_step5', which is not there" if name == "pointer_alone" else ".metadata"
    for command in ("ls", "verify", "latest", "doctor", "push"):
        text = text_of(command, tmp_path, capsys)
        assert path.name in text and cause in text, command
        assert "incomplete: " in text or command in ("latest", "push"), command


@pytest.mark.parametrize("command", ["slim", "pin", "push", "collect"])
def test_a_pointer_that_leads_further_down_names_the_folder_there(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / "zero2-bf16-w2/global_step2", tmp_path / "a/b/global_step2")
    (tmp_path / "latest").write_text("a/b/global_step2")
    folder = tmp_path / "a/b"
    text = text_of(command, tmp_path, capsys)
    assert text == f"ckpt: {tmp_path} leads to the checkpoint {folder}; name that\n"
    assert text not in text_of(command, folder, capsys)
