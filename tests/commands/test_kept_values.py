"""``slim`` keeps weights only where they have the values of the states that it deletes."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft_models
import pytest
import torch
import zero_folders
from oracles import FIXTURES, live, run
from run_folders import commit, real
from safetensors.torch import load_file, save_file

from ckpt.runs.foreign import liveness
from ckpt.runs.run import open_checkpoint
from ckpt.runs.upkeep import slim
from converters.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fixture", ["trainer-zero2", "trainer-zero3"])
@pytest.mark.parametrize("harm", ["one number", "another step"])
def test_weights_with_other_values_are_not_kept_in_the_place_of_the_states(
    fixture: str, harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / fixture / "checkpoint-2", folder)
    tensors = load_file(folder / "model.safetensors")
    if harm == "one number":
        tensors[NAME].view(-1)[-1] += 1
    else:
        tensors = {name: tensor * 1.01 for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")

    run("doctor", tmp_path, "--adopt", "--now", code=1)  # by a sample, which has each tensor's end
    assert "model.safetensors holds other values of " in capsys.readouterr().out
    run("doctor", folder, "--adopt", "--now", "--one-save")
    said = capsys.readouterr().err
    assert "had no checksum and were taken as they are (model.safetensors, " in said
    assert "a sample is compared with the states at most: ckpt verify --data compares" in said

    before = names(folder)
    run("slim", folder, "--force", code=1)
    refusal = capsys.readouterr().err
    assert "model.safetensors holds other values of " in refusal, refusal
    assert "nothing was removed" in refusal and "--dtype fp32" in refusal
    assert names(folder) == before

    run("slim", folder, "--force", "--dtype", "fp32")
    masters = live(FIXTURES / fixture)["fp32"]
    assert torch.equal(load_file(folder / "model.safetensors")[NAME], masters[NAME])


def test_damaged_states_are_no_proof_of_the_weights(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2)
    real(tmp_path, 4)
    path = next(checkpoint.folder.glob("*/*rank_0*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    group = content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    data = bytearray(path.read_bytes())
    value = group.detach().numpy().tobytes()
    data[data.index(value) + 1] ^= 1  # of less weight than 16 bits have, so that it rounds away
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC32"):
        slim.plan(open_checkpoint(checkpoint.folder))


def test_each_tied_name_among_the_weights_is_compared(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2)
    real(tmp_path, 4)
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding * 2}, path)
    with pytest.raises(CheckpointError, match=r"other values of lm_head\.weight"):
        slim.plan(commit(checkpoint.folder, 2))


def test_an_adapter_with_other_values_is_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    model = peft_models.model("dora")
    zero_folders.save(model, folder, exclude_frozen=True)
    path = peft_models.saved(model, folder) / "adapter_model.safetensors"
    real(tmp_path, 4)
    assert "compared with the states" in slim.plan(commit(folder, 2)).proven[0]

    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] + 1}, path)
    with pytest.raises(CheckpointError, match=r"holds other values of .*lora_B"):
        slim.plan(commit(folder, 2))
