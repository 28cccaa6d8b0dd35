"""A format that is added as the guide has it: a reader and a row, and every sentence is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles import run
from safetensors.numpy import save_file

from converters.detect import detect, filenames, foreign, kinds, weights
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.source import Place, Source
from converters.zero import checkpoint as zero

NAME = "w.toy"
STATEMENT = "is a file of weights in the toy format"
INSTEAD = f"{STATEMENT}, not a DeepSpeed checkpoint"


def _seen(look: Look) -> str | None:
    if look.is_file:
        return look.path.name if look.path.suffix == ".toy" else None
    return look.has([NAME])


@pytest.fixture(params=["", "ckpt.open reads it"])
def toy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a format of weights that nothing refuses, in a folder of its own."""
    row = Kind(
        name="toy",
        title="weights in the toy format",
        recognized_by="the suffix `.toy`",
        sign=_seen,
        reader=f"{__name__}:read",
        statement=STATEMENT,
        remedy=request.param,
    )
    place = kinds.KINDS.index(weights.KINDS[0])  # where the guide has it
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS[:place], row, *kinds.KINDS[place:]))
    monkeypatch.setattr(kinds, "BY_NAME", {**kinds.BY_NAME, "toy": row})
    monkeypatch.setattr("ckpt.cli.conversion.BY_NAME", kinds.BY_NAME)
    monkeypatch.setattr("converters.detect.detection.import_module", lambda _: _Reader)

    folder = tmp_path / "parent" / "toys"
    folder.mkdir(parents=True)
    save_file({"a": np.ones(3, "f4")}, folder / NAME)
    return folder


class _Reader:
    """The module that the row names."""

    @staticmethod
    def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
        file = path if path.is_file() else path / NAME
        return Source(
            kind="toy",
            place=Place(path, path, NAME),
            weights=safetensors.read(file),
            files={file: None},
        )


def test_a_folder_of_such_folders_says_what_they_are(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("show", "to-fp32"):
        run(command, toy.parent, code=1)
        error = capsys.readouterr().err
        assert f"it holds toys, which {STATEMENT}: name {toy}\n" in error


def test_what_means_deepspeed_says_what_lies_there(toy: Path) -> None:
    for path in (toy, toy / NAME):
        with pytest.raises(CheckpointError) as error:
            zero.read(path)
        assert str(error.value).startswith(f"{path} {INSTEAD}")


def test_a_conversion_claims_nothing_that_was_not_checked(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", toy, "-o", toy.parent / "out", "--dry-run")
    assert "kind         weights in the toy format\n" in capsys.readouterr().out
    run("to-fp32", toy, "-o", toy.parent / "out")
    out = capsys.readouterr().out
    assert "0 B by CRC32" not in out and "padding" not in out
    assert "\nnot verified: " in out


def test_a_file_of_a_zip_format_is_no_archive(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(toy / "w.npz", a=np.ones(3, "f4"))
    (toy / "w.npz").replace(toy / NAME)
    assert detect(toy / NAME).kind.name == "archive"
    monkeypatch.setattr(filenames, "ZIP_SUFFIXES", (*filenames.ZIP_SUFFIXES, ".toy"))
    assert detect(toy / NAME).kind.name == detect(toy).kind.name == "toy"
    assert detect(toy.parent).evidence.startswith("toys, which is a file of weights in the toy")


def test_a_format_that_is_taken_out_of_the_foreign_ones_is_left_to_its_own_row(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the guide says of GGUF, numpy and the others that nothing here reads."""
    formats = [each for each in foreign.FORMATS if each.name != "numpy"]
    (toy / NAME).rename(toy / "w.npy")
    assert detect(toy).kind.name == "foreign-folder"
    monkeypatch.setattr(foreign, "FORMATS", formats)
    assert detect(toy).kind.name == "unknown"
