"""State dicts whose names are unlike the parameters': what is trained is fp32, once, and named."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_checkpoints import make_checkpoint
from oracles import FIXTURES, convert, live, run, same

import ckpt
from converters.errors import CheckpointError
from converters.names import rules
from converters.zero import checkpoint

STAGES = ["zero1-bf16-w2", "zero2-bf16-w3", "zero2-round-robin", "zero3-bf16-w2", "zero3-subgroups"]
Change = Callable[[str], str]


def wrapped(name: str) -> str:
    """The parameter's name for one in the state dict, as checkpoint_wrapper makes it."""
    first, _, rest = name.partition(".0.")
    return f"{first}.0._checkpoint_wrapped_module.{rest}" if rest else name


def prefixed(name: str) -> str:
    return name.removeprefix("inner.") if name.startswith("inner.") else f"core.{name}"


def moved(tmp_path: Path, name: str, change: Change) -> Path:
    """A fixture whose parameters, and buffers, have other names than its state dict.

    The state dict keeps the names: the truth stays what it is.
    """
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / name, source)
    for path in sorted(source.glob("*/*model_states.pt")):
        root = torch.load(path, weights_only=False)
        root["param_shapes"] = [
            OrderedDict((change(key), shape) for key, shape in group.items())
            for group in root["param_shapes"]
        ]
        root["buffer_names"] = [change(key) for key in root["buffer_names"]]
        root["shared_params"] = {
            change(key): change(owner) for key, owner in (root["shared_params"] or {}).items()
        }
        for key in ("frozen_param_shapes", "frozen_param_fragments"):
            if root.get(key):
                root[key] = OrderedDict((change(k), value) for k, value in root[key].items())
        torch.save(root, path)
    return source


def judge(source: Path, name: str, output: Path) -> dict:
    """The converted weights are those that the fixture gives as it is; returns the record."""
    expected = convert(FIXTURES / name, output / "expected")
    found = convert(source, output / "found")
    assert found.keys() == expected.keys()
    assert all(same(found[key], value) for key, value in expected.items())
    records = [
        json.loads((output / which / "conversion.json").read_text())
        for which in ("expected", "found")
    ]
    assert records[0]["aliases"] == records[1]["aliases"]
    assert records[0]["absent"] == records[1]["absent"]
    stages = [record["source"]["stage"] for record in records]
    compared = [record["checks"]["compared_tensors"] for record in records]
    assert stages[0] != stages[1] or compared[0] == compared[1]
    return records[1]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("change", [wrapped, prefixed])
def test_the_names_of_the_state_dict_are_written(name: str, change: Change, tmp_path: Path) -> None:
    source = moved(tmp_path, name, change)
    assert checkpoint.read(source).names.state
    judge(source, name, tmp_path)
    buffers = checkpoint.read(FIXTURES / name).weights.buffers
    assert checkpoint.read(source).weights.buffers == buffers


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-bf16-w2"])
def test_optimizer_state_is_found_by_the_names_of_the_state_dict(name: str, tmp_path: Path) -> None:
    source = moved(tmp_path, name, wrapped)
    with ckpt.open(source) as weights:
        for key, value in live(FIXTURES / name)["exp_avg"].items():
            if value.numel():
                assert same(weights.optimizer_state(key)["exp_avg"].float(), value.float()), key


def scrambled(name: str) -> str:
    """A name that no rule leads back from."""
    return f"p{sum(map(ord, name)) * len(name) % 100003}"


def test_storages_tell_where_no_rule_does(tmp_path: Path) -> None:
    source = moved(tmp_path, "zero2-bf16-w3", scrambled)
    read = checkpoint.read(source)
    assert read.names.state and read.names.rule is None
    expected = checkpoint.read(FIXTURES / "zero2-bf16-w3").weights
    trained = expected.copies.keys()
    assert trained == read.weights.copies.keys()
    assert all(read.weights.tensors[key].shape == expected.tensors[key].shape for key in trained)
    found = convert(source, tmp_path / "found")
    for key, value in live(FIXTURES / "zero2-bf16-w3")["fp32"].items():
        assert key not in found or same(found[key], value), key


def test_without_a_rule_stage_3_keeps_the_parameters_names_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = moved(tmp_path, "zero3-bf16-w2", scrambled)
    found = convert(source, tmp_path / "found")
    for key, value in live(FIXTURES / "zero3-bf16-w2")["fp32"].items():
        if scrambled(key) in found:
            assert same(found[scrambled(key)], value), key
    said = capsys.readouterr().err
    assert "no one rule turns these into those" in said
    assert "without elements" not in said


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-bf16-w2"])
def test_resharded_the_names_stay_apart(name: str, stage: int, tmp_path: Path) -> None:
    source = moved(tmp_path, name, wrapped)
    run("reshard", source, "-o", tmp_path / "other", "--world-size", 4, "--stage", stage)
    made = checkpoint.read(tmp_path / "other")
    assert made.names.state == checkpoint.read(source).names.state
    model = torch.load(made.model.path, weights_only=False)
    names = {key for group in model["param_shapes"] for key in group}
    assert any("_checkpoint_wrapped_module" in key for key in names)
    assert not any("_checkpoint_wrapped_module" in key for key in model["module"])
    judge(tmp_path / "other", name, tmp_path)


def test_reshard_and_to_universal_refuse_what_could_not_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = moved(tmp_path, "zero2-bf16-w3", scrambled)
    run("reshard", source, "-o", tmp_path / "a", "--world-size", 2, "--stage", 3, code=1)
    assert "reshard it to stage 1 or 2" in capsys.readouterr().err
    run("reshard", source, "-o", tmp_path / "b", "--world-size", 2, "--stage", 2)
    run("to-universal", source, "-o", tmp_path / "c", code=1)
    assert "the universal format has a folder for each name" in capsys.readouterr().err


def test_a_parameter_that_the_state_dict_cuts_up_is_fp32_in_each_piece(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "zero2-bf16-w3", source)
    (path,) = source.glob("*/*model_states.pt")
    root = torch.load(path, weights_only=False)
    whole = root["module"].pop("blocks.0.up.weight")
    half = len(whole) // 2
    root["module"] |= {"up.first": whole[:half], "up.second": whole[half:], "turned": whole.t()}
    torch.save(root, path)

    found = convert(source, tmp_path / "found")
    expected = live(FIXTURES / "zero2-bf16-w3")["fp32"]["blocks.0.up.weight"]
    assert same(torch.cat([found["up.first"], found["up.second"]]), expected)
    assert "blocks.0.up.weight" not in found and "turned" not in found
    assert "another order" in checkpoint.read(source).weights.absent["turned"]
    run("reshard", source, "-o", tmp_path / "other", "--world-size", 2, code=1)


def test_a_module_of_clones_is_named_by_rule_shape_and_value(tmp_path: Path) -> None:
    source = moved(tmp_path, "zero2-bf16-w3", wrapped)
    (path,) = source.glob("*/*model_states.pt")
    root = torch.load(path, weights_only=False)
    root["module"] = OrderedDict((k, v.clone()) for k, v in root["module"].items())
    torch.save(root, path)
    found = convert(source, tmp_path / "found")
    for key, value in live(FIXTURES / "zero2-bf16-w3")["fp32"].items():
        assert key not in found or same(found[key], value), key
    assert not any("_checkpoint_wrapped_module" in key for key in found)


def test_a_rule_is_one_for_all_or_none() -> None:
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in "qk"]

    def turned(change: Change, *more: str) -> bool:
        states = [change(name) for name in names]
        found = rules.rule(names, {*states, *more})
        return found is not None and [found(name) for name in names] == states

    assert turned(lambda name: f"model.{name}")
    assert turned(lambda name: name.replace("layers.", "h."))
    assert turned(lambda name: name.replace("layers.", "model.blocks.", 1))
    assert turned(lambda name: name.replace(".weight", ".base.weight"))
    assert turned(lambda name: name.replace("layers.", "h_"))
    assert not turned(lambda name: name[::-1])
    assert rules.rule(["a.weight"], {"b.weight", "c.weight"}) is None  # either would do
    assert rules.rule(["a.weight", "b.weight"], {"x.a.weight"}) is None


def test_a_rule_takes_wrappers_off_and_renames_what_is_left() -> None:
    names = [
        f"layers.{i}._checkpoint_wrapped_module.{part}.weight" for i in range(2) for part in "qn"
    ]
    states = [name.replace("_checkpoint_wrapped_module.", "") for name in names]
    assert (found := rules.rule(names, set(states))) and [found(n) for n in names] == states
    states = [name.replace(".n.", ".norm.") for name in states]
    assert (found := rules.rule(names, set(states))) and [found(n) for n in names] == states


def test_without_zero_a_hook_may_change_the_order_of_the_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "zero0-bf16", source)
    (path,) = source.glob("*/*model_states.pt")
    root = torch.load(path, weights_only=False)
    root["module"] = OrderedDict(reversed(root["module"].items()))
    torch.save(root, path)
    found = convert(source, tmp_path / "found")
    values = live(FIXTURES / "zero0-bf16")["fp32"]
    assert sum(name in found for name in values) > 3
    assert all(same(found[name], value) for name, value in values.items() if name in found)


def test_further_views_of_what_is_trained_are_fp32_too(tmp_path: Path) -> None:
    for name in ("zero0-bf16", "zero1-bf16-w2", "zero2-bf16-w2"):
        source = tmp_path / name
        shutil.copytree(FIXTURES / name, source)
        (path,) = source.glob("*/*model_states.pt")
        root = torch.load(path, weights_only=False)
        root["module"]["flat"] = root["module"]["blocks.0.up.weight"].reshape(-1)
        torch.save(root, path)
        found = convert(source, tmp_path / f"{name}-out")
        expected = live(FIXTURES / name)["fp32"]["blocks.0.up.weight"]
        assert same(found["flat"], expected.reshape(-1)), name


def test_names_made_to_take_long_end_the_search() -> None:
    names = [f"a.{i}.weight" for i in range(3000)]
    states = {f"{'b.' * (i % 50)}{i}.weight" for i in range(3000)}
    assert rules.rule(names, states) is None


def test_a_file_of_another_save_is_no_renaming(tmp_path: Path) -> None:
    source = moved(tmp_path, "zero2-bf16-w3", lambda name: name)
    (path,) = source.glob("*/*model_states.pt")
    root = torch.load(path, weights_only=False)
    group = root["param_shapes"][0]
    names = list(group)
    at = next(i for i, n in enumerate(names) if group[n] != group[names[0]])
    names[0], names[at] = names[at], names[0]
    shapes = list(group.values())
    root["param_shapes"][0] = OrderedDict(zip(names, shapes, strict=True))
    torch.save(root, path)
    with pytest.raises(CheckpointError, match="param_shapes"):
        checkpoint.read(source)


def test_a_running_engines_parameters_have_the_names_of_the_state_dict() -> None:
    from torch import nn
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from ckpt.engine.inventory import _named_parameters

    model = nn.Sequential(nn.Linear(2, 3), checkpoint_wrapper(nn.Linear(3, 3)), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    names = set(model.state_dict())
    parameters, aliases = _named_parameters(model, model.state_dict(keep_vars=True))
    assert {*parameters, *aliases} == names
    assert aliases == {"2.weight": "1.weight"}
    assert parameters["1.weight"] is model[2].weight


def rewritten(tmp_path: Path, fixture: str, change: Callable[[dict], object]) -> Path:
    """A fixture whose state dict a hook has changed."""
    source = tmp_path / "hooked"
    shutil.copytree(FIXTURES / fixture, source)
    for path in sorted(source.glob("*/*model_states.pt")):
        root = torch.load(path, weights_only=False)
        change(root)
        torch.save(root, path)
    return source


def first_matrix(root: dict) -> str:
    module = root["module"]
    shapes = {name: shape for group in root["param_shapes"] for name, shape in group.items()}
    shared = {*(root["shared_params"] or {}), *(root["shared_params"] or {}).values()}
    return next(n for n, s in shapes.items() if len(s) == 2 and n in module and n not in shared)


@pytest.mark.parametrize("fixture", ["zero1-bf16-w2", "zero2-bf16-w3"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_copies_that_a_hook_makes_are_found_by_their_values(
    pieces: int, fixture: str, tmp_path: Path
) -> None:
    origin: list[str] = []

    def copy(root: dict) -> None:
        origin.append(first_matrix(root))
        whole = root["module"].pop(origin[0])
        for number, part in enumerate(whole.chunk(pieces)):
            root["module"][f"other{number}.values"] = part.clone()

    source = rewritten(tmp_path, fixture, copy)
    expected = live(FIXTURES / fixture)["fp32"][origin[0]].chunk(pieces)
    found = convert(source, tmp_path / "out")
    assert origin[0] not in found
    for number, part in enumerate(expected):
        assert same(found[f"other{number}.values"], part.contiguous())
    notes = json.loads((tmp_path / "out/conversion.json").read_text())["notes"]
    assert not any("state dict lacks" in note for note in notes)


def test_copies_in_another_layout_are_said_to_be(tmp_path: Path) -> None:
    def transpose(root: dict) -> None:
        name = first_matrix(root)
        root["module"]["other.values"] = root["module"].pop(name).t().contiguous()

    source = rewritten(tmp_path, "zero2-bf16-w3", transpose)
    convert(source, tmp_path / "out")
    notes = json.loads((tmp_path / "out/conversion.json").read_text())["notes"]
    assert any("and has other.values, which no parameter's values are" in note for note in notes)


def test_of_stage_3_a_hook_may_have_changed_the_layout(tmp_path: Path) -> None:
    source = moved(tmp_path, "zero3-bf16-w2", prefixed)
    convert(source, tmp_path / "out")
    notes = json.loads((tmp_path / "out/conversion.json").read_text())["notes"]
    assert any("does not record whether the hook changed their layout" in note for note in notes)


@pytest.mark.parametrize("fixture", ["zero1-bf16-w2", "zero2-bf16-w3"])
def test_a_hook_may_leave_the_16_bit_weights_in_fp32(fixture: str, tmp_path: Path) -> None:
    changed: list[str] = []

    def widen(root: dict) -> None:
        changed.append(first_matrix(root))
        root["module"][changed[0]] = root["module"][changed[0]].float()

    source = rewritten(tmp_path, fixture, widen)
    found = convert(source, tmp_path / "out")
    assert same(found[changed[0]], live(FIXTURES / fixture)["fp32"][changed[0]])

    def spoil(root: dict) -> None:
        root["module"][changed[0]][0, 0] += 1

    shutil.rmtree(source)
    run("to-fp32", rewritten(tmp_path, fixture, lambda r: (widen(r), spoil(r))), code=1)


def test_stacked_experts_are_found_part_by_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"mlp.experts.{i}.{part}.weight" for i in range(20) for part in ("gate", "up", "down")]
    held = {name: torch.randn(4, 8) for name in names} | {"norm.weight": torch.ones(8)}
    source = make_checkpoint(tmp_path / "c", held)
    (path,) = source.glob("*/*model_states.pt")
    root = torch.load(path, weights_only=False)
    module = {name: root["module"].pop(name) for name in names}

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([value for name, value in module.items() if f".{part}." in name])

    made = {"up_gate": torch.cat([stacked("up"), stacked("gate")], 1), "downs": stacked("down")}
    root["module"] |= {f"mlp.experts.{name}": value for name, value in made.items()}
    torch.save(root, path)

    weights = checkpoint.read(source).weights
    assert weights.trained == weights.copies.keys() == weights.tensors.keys()
    found = convert(source, tmp_path / "m")
    downs = [held[name] for name in names if ".down." in name]
    assert same(found["mlp.experts.downs"], torch.stack(downs))
    both = [
        torch.cat([held[f"mlp.experts.{i}.{p}.weight"] for p in ("up", "gate")]) for i in range(20)
    ]
    assert same(found["mlp.experts.up_gate"], torch.stack(both))
