"""Committed checkpoints of trainings without DeepSpeed: no tag, no stage, and needed weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt.folders import filenames
from ckpt.runs import manifest
from ckpt.runs.fields import FieldError
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.verify import verify
from converters.detect import detect
from converters.errors import CheckpointError

SAVED = Manifest(
    step=2, tag=None, tier="full", save="ab" * 16, created=1.0, stage=None, world_size=1, name=None
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a Trainer in one process saves, in short, committed; ``latest`` names it."""
    folder = tmp_path / "out/checkpoint-2"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    (folder / "config.json").write_text("{}")
    files = {path.name: manifest.digest(path) for path in folder.iterdir()}
    (folder / filenames.MANIFEST).write_bytes(replace(SAVED, files=files).dumps())
    run = Run(folder.parent)
    run.point("latest", open_checkpoint(folder))
    return folder


def test_a_full_checkpoint_has_a_tag_where_it_has_a_stage() -> None:
    with pytest.raises(FieldError, match="of a ZeRO stage"):
        replace(SAVED, stage=0)


def test_it_is_committed_and_latest_leads_to_it(checkpoint: Path) -> None:
    run = checkpoint.parent
    assert (run / "latest").read_text() == "checkpoint-2"
    assert Run(run).pointer() == open_checkpoint(checkpoint)
    detection = detect(run)
    assert (detection.kind.name, detection.path) == ("trainer", checkpoint)
    assert verify(open_checkpoint(checkpoint), data=True).whole


@pytest.mark.parametrize(
    ("name", "is_committed"), [("config.json", True), ("model.safetensors", False)]
)
def test_a_resume_needs_the_weights(checkpoint: Path, name: str, is_committed: bool) -> None:
    """With DeepSpeed's files beside them, nobody needs them."""
    (checkpoint / name).unlink()
    assert open_checkpoint(checkpoint).committed is is_committed


def test_files_of_another_form_are_refused_before_they_are_loaded(checkpoint: Path) -> None:
    """The Trainer would end in an error of its own about a file that is not there."""
    from ckpt.resuming import plain

    plain.require_same_files(checkpoint, "SHARDED_STATE_DICT")  # an older one notes nothing
    topology = {"world_size": 1, "sharding": "FSDP2, SHARDED_STATE_DICT"}
    progress = {"settings": {"topology": topology}}
    content = replace(manifest.read(checkpoint), progress=progress).dumps()
    (checkpoint / filenames.MANIFEST).write_bytes(content)
    plain.require_same_files(checkpoint, "SHARDED_STATE_DICT")
    for form in ("none", "FULL_STATE_DICT"):
        with pytest.raises(CheckpointError, match=f"SHARDED_STATE_DICT saved, {form} now"):
            plain.require_same_files(checkpoint, form)
