"""What is no checkpoint is called what it is, with what to do."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles import FIXTURES, convert, run
from safetensors.numpy import save_file

from converters.storage import misplaced_files

NAME = "zero2-bf16-w2"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 153733\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title>"
Said = Callable[..., str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / NAME, tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    def told(path: Path, *options: str) -> str:
        run("to-fp32", path, "-o", tmp_path / "out", *options, code=1)
        return capsys.readouterr().err

    return told


def files(source: Path) -> list[Path]:
    return sorted(source.glob("*/*_states.pt"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself: run git lfs pull"),
        (PAGE, "is a web page (HTML)"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML text"),
        (b"Entry not found", "is an answer of a server ('Entry not found'), not the file itself"),
        (b'{"error":"Repository not found"}', "is an answer of a server"),
        (gzip.compress(b"x", mtime=0), "is a compressed archive"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_something_else(source: Path, said: Said, data: bytes, told: str) -> None:
    for path in files(source):
        whole = path.read_bytes()
        path.write_bytes(data)
        assert told in (line := said(source)) and path.name in line
        path.write_bytes(whole)


@pytest.mark.parametrize("data", [POINTER, PAGE, b""])
def test_safetensors_and_json_that_are_something_else(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckpt.weights.companions import model_folder
    from ckpt.weights.opening import opened
    from converters.errors import CheckpointError

    for name in ("model.safetensors", "config.json"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            opened.open(path) if name.startswith("model") else model_folder.read_object(path)
        expected = {POINTER: "git lfs pull", PAGE: "web page", b"": str(path)}[data]
        assert expected in str(error.value)


def test_a_download_that_did_not_end(source: Path, said: Said) -> None:
    path = files(source)[0]
    path.rename(f"{path}.incomplete")
    assert f"{path.name}.incomplete is a download that did not end" in said(source)
    Path(f"{path}.incomplete").unlink()
    cache = source / ".cache/huggingface/download/global_step2"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").touch()
    assert "run hf download again" in said(source)


def test_a_folder_with_weights_already(tmp_path: Path, said: Said) -> None:
    import numpy as np

    save_file({"a": np.zeros(3, "f4")}, tmp_path / "model.safetensors")
    line = said(tmp_path)
    assert "has the weights already, model.safetensors" in line and "nothing to convert" in line
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    assert "git lfs pull" in said(tmp_path)


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
def test_a_folder_of_fsdp(tmp_path: Path, said: Said, inner: str) -> None:
    folder = tmp_path / "f" / inner
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "__0_0.distcp").touch()
    assert f"{folder / '.metadata'} is empty; copy it again" in said(tmp_path / "f")


def cached(source: Path, cache: Path) -> Path:
    """The checkpoint as the Hub client's cache keeps it: links to blobs."""
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    blobs.mkdir(parents=True)
    (cache / "refs").mkdir()
    for number, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / f"{number:064x}")
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    return snapshot


def test_the_cache_of_the_hub(source: Path, tmp_path: Path, said: Said) -> None:
    import json

    snapshot = cached(source, tmp_path / "models--a--b")
    convert(snapshot, tmp_path / "m")
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    names = {file["name"] for file in record["source"]["files"]}
    assert names == {path.relative_to(source).as_posix() for path in files(source)}

    assert "snapshots/abc" in said(tmp_path / "models--a--b")
    latest = snapshot / "latest"
    latest.resolve().unlink()
    assert "latest is a link to" in (line := said(snapshot)) and "hf download" in line


def test_what_is_nothing_known_is_not_guessed(tmp_path: Path) -> None:
    assert misplaced_files.content(b"PK\x03\x04") is None and misplaced_files.content(b"") is None
    assert misplaced_files.missing(tmp_path / "none") == ""
    assert misplaced_files.file(tmp_path / "none") is None


def test_a_file_of_a_checkpoint_names_its_folder(source: Path, said: Said) -> None:
    path = files(source)[0]
    message = said(path)
    assert message.endswith(f"the checkpoint is its folder: {source}\n")

    (source / "latest").write_text("global_step9")  # which a conversion of the folder would take
    assert said(path).endswith(f"the checkpoint is its folder: {path.parent}\n")


def test_a_blob_that_is_gone(source: Path, tmp_path: Path, said: Said) -> None:
    snapshot = cached(source, tmp_path / "models--a--b")
    path = files(snapshot)[0]
    path.resolve().unlink()
    assert f"{path.name} is a link to" in said(snapshot)
