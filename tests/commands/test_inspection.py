"""``ckpt stats`` and ``ckpt diff`` on whole checkpoints, of any kind and number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, run
from safetensors.torch import load_file, save_file

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"
Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    run(*arguments, "--json", code=code)
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What ckpt makes of one checkpoint: each is the same training."""
    out = tmp_path_factory.mktemp("models")
    run("to-fp32", SOURCE, "-o", out / "fp32")
    run("to-fp32", SOURCE, "-o", out / "bf16", "--dtype", "bf16")
    run("reshard", SOURCE, "--world-size", "3", "-o", out / "w3")
    run("to-universal", SOURCE, "-o", out / "universal")
    run("to-dcp", SOURCE, "-o", out / "dcp")
    return {path.name: path for path in out.iterdir()}


def changed(models: dict[str, Path], folder: Path, value: float) -> Path:
    """A copy of the model with another first number in one tensor."""
    shutil.copytree(models["fp32"], folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["fp32", "w3", "universal", "dcp"])
def test_all_forms_of_a_training_have_the_same_numbers(
    name: str, models: dict[str, Path], capsys: Capture
) -> None:
    expected = printed(capsys, "stats", SOURCE)
    found = printed(capsys, "stats", models[name])
    assert found["numbers_by_name"] == expected["numbers_by_name"]
    assert found["all_numbers"] == expected["all_numbers"]

    comparison = printed(capsys, "diff", SOURCE, models[name], "--exact")
    assert comparison["equal"] and len(comparison["distances"]) == 20


@pytest.mark.parametrize("name", ["w3", "universal", "dcp"])
def test_states_of_the_optimizer_are_compared(
    name: str, models: dict[str, Path], capsys: Capture
) -> None:
    options = ("--state", "exp_avg_sq", "--exact")
    found = printed(capsys, "diff", SOURCE, models[name], *options)
    assert found["equal"] and found["first"]["values_of"] == "exp_avg_sq"
    assert not any(entry["changed"] for entry in found["distances"].values())


def test_states_are_those_of_the_file(capsys: Capture) -> None:
    found = printed(capsys, "stats", FIXTURES / "zero1-fp32-w1", "--state", "exp_avg_sq")
    (path,) = (FIXTURES / "zero1-fp32-w1").rglob("*optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    vectors = [each["exp_avg_sq"].double() for each in state["state"].values()]
    total = torch.cat([vector.flatten() for vector in vectors])
    assert found["all_numbers"]["maximum"] == total.max().item()
    assert found["all_numbers"]["norm"] == pytest.approx(total.norm().item())
    assert found["crc32_bytes"] > 0


def test_a_rounded_model_is_the_same_but_for_its_bits(
    models: dict[str, Path], capsys: Capture
) -> None:
    found = printed(capsys, "diff", models["fp32"], models["bf16"])
    assert found["equal"] and all(entry["rounded"] for entry in found["distances"].values())
    assert not printed(capsys, "diff", models["fp32"], models["bf16"], "--exact", code=1)["equal"]


def test_a_changed_number_is_found(
    models: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    other = changed(models, tmp_path / "other", 1.5)
    found = printed(capsys, "diff", SOURCE, other, code=1)
    unlike = {name for name, entry in found["distances"].items() if not entry["equal"]}
    assert unlike == {"model.norm.weight"}
    assert found["modules"]["model.norm"]["changed"] == found["all_distances"]["changed"] == 1

    run("diff", SOURCE, other, "--tolerance", "0.6")
    run("diff", SOURCE, other, "*embed*")
    run("diff", SOURCE, other, "--modules", "--depth", "2", code=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines[-3:-1]] == ["model.norm", "all"]
    assert lines[-1] == "1 tensor with other numbers; 19 tensors the same"


def test_nan_is_what_stats_fails_on(
    models: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    other = changed(models, tmp_path / "other", float("nan"))
    run("stats", other)
    run("stats", other, "--fail-on", "inf")
    run("stats", other, "*embed*", "--fail-on", "nan")
    run("stats", other, "--fail-on", "nan", code=1)
    assert "1 tensor of" in capsys.readouterr().err
    assert printed(capsys, "diff", SOURCE, other, code=1)["all_distances"]["max_distance"] == "inf"


def test_names_shapes_and_ties_of_one_side(tmp_path: Path, capsys: Capture) -> None:
    first = {"model.a": torch.ones(2), "model.b": torch.ones(3), "model.c": torch.ones(4)}
    second = {"module.model.a": torch.ones(2), "module.model.c": torch.ones(2, 2)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    arguments = ("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = printed(capsys, *arguments, code=1)
    assert found["only_first"] == ["model.b"] and found["only_second"] == []
    assert found["other_shapes"] == {"model.c": {"first_shape": [4], "second_shape": [2, 2]}}
    assert found["names"] == "names of B are without wrappers"

    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.ones(3)}}, tmp_path / "c.pt")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "d.safetensors")
    found = printed(capsys, "diff", tmp_path / "c.pt", tmp_path / "d.safetensors", "--exact")
    assert found["names"] == "names of A are without state_dict."


def test_a_tied_name_that_one_side_lacks_is_no_difference(tmp_path: Path, capsys: Capture) -> None:
    weight = torch.ones(4)
    torch.save({"embed": weight, "head": weight}, tmp_path / "a.bin")
    save_file({"embed": weight}, tmp_path / "b.safetensors")
    save_file({"head": weight}, tmp_path / "c.safetensors")
    for other in ("b", "c"):
        found = printed(capsys, "diff", tmp_path / "a.bin", tmp_path / f"{other}.safetensors")
        assert len(found["distances"]) == 1


def test_the_base_below_an_adapter_is_compared_with_the_base(
    tmp_path: Path, capsys: Capture
) -> None:
    module = "base_model.model.model.layers.0.q_proj"
    weight, norm = torch.randn(4, 4), torch.ones(4)
    trained = {
        f"{module}.base_layer.weight": weight,
        f"{module}.lora_A.default.weight": torch.ones(2, 4),
        f"{module}.lora_B.default.weight": torch.zeros(4, 2),
        "base_model.model.model.norm.weight": norm,
    }
    save_file(trained, tmp_path / "run.safetensors")
    base = {"model.layers.0.q_proj.weight": weight, "model.norm.weight": norm}
    save_file(base, tmp_path / "base.safetensors")
    sides = (tmp_path / "base.safetensors", tmp_path / "run.safetensors")
    found = printed(capsys, "diff", *sides)
    assert found["names"] == "names of B are those of the base model"
    assert len(found["distances"]) == 2


def test_wrong_wishes_are_answered(capsys: Capture, models: dict[str, Path]) -> None:
    run("stats", SOURCE, "--state", "momentum", code=1)
    assert "it has exp_avg, exp_avg_sq" in capsys.readouterr().err
    run("stats", models["fp32"], "--state", "exp_avg", code=1)
    assert "leave --state out" in capsys.readouterr().err
    run("stats", SOURCE, "nothing*", code=1)
    assert "no name matches 'nothing*'" in capsys.readouterr().err
    run("diff", SOURCE, SOURCE, "--exact", "--tolerance", "1", code=2)
    run("diff", SOURCE, SOURCE, "--depth", "1", code=2)


def test_damage_is_an_error_unless_nothing_is_verified(tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "zero1-fp32-w1", source)
    (path,) = source.rglob("*optim_states.pt")
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    master = state["single_partition_of_fp32_groups"][0].detach().numpy().tobytes()
    content[content.index(master) + 8] ^= 1
    path.write_bytes(content)

    run("stats", source, code=1)
    assert "is damaged" in capsys.readouterr().err
    run("stats", source, "--no-verify")
    assert printed(
        capsys, "diff", source, SOURCE.parent / "live.safetensors", "--no-verify", code=1
    )
