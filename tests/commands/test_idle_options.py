"""Options that change nothing in the output are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft_models
import pytest
import zero_folders

from ckpt.weights.conversion import convert
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError


def checkpoint(root: Path) -> Path:
    model = peft_models.model("lora")
    peft_models.saved(model, root / "live")
    made = zero_folders.save(model, root / "checkpoint-2")
    shutil.copy(root / "live/adapter_config.json", made)
    return made


def idle(path: Path, **wishes: Any) -> list[str]:
    made = convert.prepare(path, path.parent / "out", request=Request(**wishes))
    ends = ("has no effect", "is not written")
    return [note for note in made.product.notes if any(end in note for end in ends)]


@pytest.mark.parametrize("option", ["untie", "dequantize", "other_base"])
def test_options_for_a_model_where_an_adapter_is_written(option: str, tmp_path: Path) -> None:
    (note,) = idle(checkpoint(tmp_path), **{option: True})
    assert note.startswith(f"{option}=True has no effect: ")


def test_a_config_where_an_adapter_is_written(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    base = tmp_path / "base"
    peft_models.llama().save_pretrained(base)
    assert not idle(path)
    (file,) = idle(path, config=base / "config.json")
    (folder,) = idle(path, config=base)
    assert file.startswith("config= has no effect") and "is not written" in folder


def test_another_base_where_the_checkpoint_has_its_own(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    base = tmp_path / "base"
    peft_models.llama().save_pretrained(base)
    (note,) = idle(path, merge=True, config=base, other_base=True)
    assert "other_base=True has no effect" in note
    with pytest.raises(CheckpointError, match="other_base=True does not go with"):
        idle(path, naming=Naming(as_stored=True), other_base=True)


def test_options_where_no_adapter_is(tmp_path: Path) -> None:
    path = zero_folders.save(peft_models.llama(), tmp_path / "checkpoint-2")
    notes = idle(path, untie=True, other_base=True)
    assert [note.partition(" ")[0] for note in notes] == ["other_base=True", "untie=True"]
