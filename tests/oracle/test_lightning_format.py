"""``--format lightning``: what ``LightningModule.load_from_checkpoint`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heavy_libraries import LateModule
from oracles import run
from stage0 import STATE

VERSION = "2.6.6"
lightning = LateModule("lightning.pytorch")
models = LateModule("lightning_models")


class Act:
    """A value of the user's own class."""


def save_lightning(
    folder: Path, module: lightning.LightningModule, prefix: str = "", **entries: Any
) -> Path:
    """``X.ckpt`` as Lightning's strategy leaves it without ZeRO, fp32."""
    root = folder / "epoch=0-step=2.ckpt"
    (root / "checkpoint").mkdir(parents=True)
    (root / "latest").write_text("checkpoint")
    state = STATE | {
        "module": {prefix + name: value for name, value in module.state_dict().items()},
        "buffer_names": [prefix + name for name, _ in module.named_buffers()],
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": VERSION,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5)}},
        "lr_schedulers": [{"last_epoch": 2, "fn": Act()}],
    }
    state = {name: value for name, value in (state | entries).items() if value is not None}
    torch.save(state, root / "checkpoint/mp_rank_00_model_states.pt")
    return root


def hyper_parameters(module: lightning.LightningModule) -> dict[str, Any]:
    return {"hparams_name": "kwargs", "hyper_parameters": dict(module.hparams)}


def require_equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    values = expected.state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("prefix", ["", "_forward_module."])
@pytest.mark.parametrize("output", ["x.ckpt", "x"])
def test_load_from_checkpoint_reads_what_was_trained(
    prefix: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    module = models.Tiny(width=5, sizes=(2, 3))
    root = save_lightning(
        tmp_path, module, prefix, **hyper_parameters(module), mine={"step": [1, 2]}
    )

    run("to-fp32", root, "--format", "lightning", "-o", tmp_path / output)
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == str(tmp_path / output)
    assert said.err == (f"names: without {prefix} (7 names)\n" if prefix else "")

    file = tmp_path / output if output == "x.ckpt" else tmp_path / output / "model.ckpt"
    found = models.Tiny.load_from_checkpoint(file, weights_only=True)
    require_equal(found, module)
    assert found.hparams == module.hparams and found.loaded == {"step": [1, 2]}
    assert not list(tmp_path.glob(".*"))

    state = torch.load(file, weights_only=True)
    assert (state["epoch"], state["global_step"]) == (1, 2) and "loops" in state
    assert state["pytorch-lightning_version"] == VERSION and "callbacks" not in state
    tied = [state["state_dict"][name].data_ptr() for name in ("model.0.weight", "head.weight")]
    assert tied[0] == tied[1]  # one storage, as torch.save leaves it


def test_an_argument_that_is_no_plain_value_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = models.Tiny(width=4, act=Act(), kind=torch.nn.ReLU, dtype=torch.bfloat16)
    root = save_lightning(tmp_path, module, **hyper_parameters(module), hooks=[Act()])
    run("to-fp32", root, "--format", "lightning", "-o", tmp_path / "x.ckpt", "--dtype", "bf16")
    said = capsys.readouterr().err
    assert "hyper_parameters: act is" in said and "load_from_checkpoint(..., act=...)" in said
    assert "hyper_parameters: kind is torch.nn.modules.activation.ReLU" in said
    assert "hooks is a list with objects in it" in said

    found = models.Tiny.load_from_checkpoint(tmp_path / "x.ckpt", act="relu", weights_only=True)
    assert found.hparams.width == 4 and found.hparams.act == "relu"
    assert found.hparams.dtype is torch.bfloat16
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(kept["model.0.weight"], module.model[0].weight.bfloat16())
    assert torch.equal(kept["count"], module.count)


def test_arguments_of_a_data_module_are_kept(tmp_path: Path) -> None:
    class Data(lightning.LightningDataModule):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    entries = {"datamodule_hparams_name": "kwargs", "datamodule_hyper_parameters": {"rows": 9}}
    root = save_lightning(tmp_path, models.Tiny(), **entries)
    run("to-fp32", root, "--format", "lightning", "-o", tmp_path / "x.ckpt")
    found = Data.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert found.hparams.rows == 9


@pytest.mark.parametrize("version", ["1.5.0", "2.0.0"])
def test_lightning_upgrades_an_older_checkpoint(version: str, tmp_path: Path) -> None:
    module = models.Tiny()
    changed = hyper_parameters(module) | {"pytorch-lightning_version": version, "loops": None}
    root = save_lightning(tmp_path, module, **changed)
    run("to-fp32", root, "--format", "lightning", "-o", tmp_path / "x.ckpt")
    require_equal(models.Tiny.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True), module)


def test_a_file_that_exists_is_replaced_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_lightning(tmp_path, models.Tiny())
    (tmp_path / "x.ckpt").write_text("mine")
    args = ["to-fp32", root, "--format", "lightning", "-o", tmp_path / "x.ckpt"]
    run(*args, code=1)
    assert "--overwrite replaces it" in capsys.readouterr().err
    run(*args, "--overwrite")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch"] == 1

    run(*args[:-1], root, code=1)
    assert "is a folder, and a file is to be written there" in capsys.readouterr().err

    (state,) = root.rglob("*model_states.pt")
    before = state.read_bytes()
    run(*args[:-1], state, "--overwrite", code=1)
    assert "which it would be made of" in capsys.readouterr().err
    assert state.read_bytes() == before


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_lightning(tmp_path, models.Tiny())
    run("to-fp32", root, "--format", "lightning", "--merge", code=1)
    assert "--merge does not go with --format lightning" in capsys.readouterr().err

    state = root / "checkpoint/mp_rank_00_model_states.pt"
    content = torch.load(state, weights_only=False)
    del content["pytorch-lightning_version"]
    torch.save(content, state)
    run("to-fp32", root, "--format", "lightning", code=1)
    assert "was not saved by Lightning" in capsys.readouterr().err


def test_a_plan_and_the_facts_tell_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_lightning(tmp_path, models.Tiny())
    args = ["to-fp32", root, "--format", "lightning", "-o", tmp_path / "x.ckpt"]
    run(*args, "--dry-run")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x.ckpt'}\t")
    run(*args, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "lightning" and facts["files"][0]["name"] == "model.ckpt"
    assert facts["files"][0]["bytes"] == (tmp_path / "x.ckpt").stat().st_size


def test_a_model_of_transformers_inside_is_had_with_its_configuration(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
            config = LlamaConfig(vocab_size=12, num_hidden_layers=1, **sizes)
            self.model = LlamaForCausalLM(config)

    module = Training()
    root = save_lightning(tmp_path, module)
    module.model.config.save_pretrained(tmp_path / "config")
    run("to-fp32", root, "-o", tmp_path / "m", "--config", tmp_path / "config")
    found, info = LlamaForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    require_equal(found, module.model)
