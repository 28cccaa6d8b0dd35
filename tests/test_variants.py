"""Variants that no real fixture shows, made from real ones by the change that DeepSpeed made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, convert, live, run, same

TAG = "global_step2"
Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    def made(name: str) -> Path:
        shutil.copytree(FIXTURES / name, tmp_path / name)
        return tmp_path / name

    return made


def edit(path: Path, change: Callable[[dict], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def optimizers(source: Path) -> list[Path]:
    return sorted((source / TAG).glob("*optim_states.pt"))


def models(source: Path) -> list[Path]:
    return sorted((source / TAG).glob("*model_states.pt"))


def check(source: Path, but: tuple[str, ...] = ()) -> dict:
    folder = source.with_name("model")
    found = convert(source, folder)
    record = json.loads((folder / "conversion.json").read_text())
    for name, value in live(source)["fp32"].items():
        if name not in but:
            assert same(found[record["aliases"].get(name, name)], value), name
    for name, value in live(source)["live"].items():
        if "frozen" in name and name not in but:
            assert same(found[name], value.float()), name
    assert set(record["absent"]) == set(but)
    return record


def test_a_fast_writers_copies_are_one_checkpoint(copy: Copy) -> None:
    source = copy("zero2-bf16-w2")
    (model,) = models(source)
    shutil.copy(model, f"{model}-1.2")
    model.rename(f"{model}-0.2")
    for rank, path in enumerate(optimizers(source)):
        path.rename(f"{path}-{rank}.2")
    check(source)


def test_names_before_0_3_14_and_no_param_shapes(copy: Copy) -> None:
    source = copy("zero2-fp16-w3")
    (model,) = models(source)

    def forget(state: dict) -> None:
        for key in ("param_shapes", "buffer_names", "shared_params", "ds_version", "ds_config"):
            state.pop(key, None)

    edit(model, forget)
    for path in optimizers(source):
        edit(path, forget)
        path.rename(path.with_name(path.name.replace("00_optim", "00optim")))
    check(source)


def test_stage_1_of_0_3_16_dealt_its_partitions_out_in_turns(copy: Copy) -> None:
    source = copy("zero1-fp16-w2")
    key = "single_partition_of_fp32_groups"
    held = [torch.load(path, weights_only=False) for path in optimizers(source)]
    groups = [
        torch.cat([state["optimizer_state_dict"][key][group] for state in held])
        for group in range(len(held[0]["optimizer_state_dict"][key]))
    ]
    for rank, (path, state) in enumerate(zip(optimizers(source), held, strict=True)):
        inner = state["optimizer_state_dict"]
        del inner[key]
        inner["local_sub_partitions_of_fp32_groups"] = [
            [
                part.clone()
                for part in flat.tensor_split([i * (-(-len(flat) // 6)) for i in range(1, 6)])[
                    rank::2
                ]
            ]
            for flat in groups
        ]
        inner["zero_stage"] = 1
        torch.save(state, path)
    (model,) = models(source)
    edit(model, lambda state: state.pop("param_shapes"))
    check(source)


@pytest.mark.parametrize("name", ["zero2-bf16-w2", "zero3-bf16-w3"])
def test_one_dict_of_shapes_for_all_groups(name: str, copy: Copy) -> None:
    """0.4.3 to 0.5.3: in the optimizer files, group after group."""
    source = copy(name)
    shapes: dict = {}
    for model in models(source):
        edit(model, lambda state: [shapes.update(group) for group in state.pop("param_shapes")])
    for path in optimizers(source):
        edit(path, lambda state: state.update(param_shapes=shapes))
    check(source)


def test_stage_3_before_0_9_lacks_frozen_values_and_says_so(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero3-bf16-w2")

    def age(state: dict) -> None:
        for key in ("frozen_param_shapes", "frozen_param_fragments", "shared_params"):
            state.pop(key)
        # as DeepSpeed saves it; a round trip through torch.load separates empty storages
        state["module"]["head.weight"] = state["module"]["embed.weight"]

    for model in models(source):
        edit(model, age)
    record = check(source, ("frozen.weight", "frozen.bias"))
    assert "not saved under stage 3" in record["absent"]["frozen.weight"]
    assert record["aliases"] == {"head.weight": "embed.weight"}  # by the placeholders' storage
    assert "absent: frozen.weight" in capsys.readouterr().err
    run("show", source)
    assert "missing      frozen.weight" in capsys.readouterr().out


def test_frozen_weights_on_nvme_or_quantized_are_absent_not_wrong(copy: Copy) -> None:
    source = copy("zero3-bf16-w2")
    for model in models(source):
        edit(
            model,
            lambda state: state["frozen_param_fragments"].update(
                {"frozen.weight": torch.tensor(0.0, dtype=torch.float16)}
            ),
        )
    assert "NVMe" in check(source, ("frozen.weight",))["absent"]["frozen.weight"]
    source = copy("zero3-bf16-w3")
    for model in models(source):
        edit(
            model,
            lambda state: state["ds_config"]["zero_optimization"].update(
                zero_quantized_nontrainable_weights=True
            ),
        )
    shutil.rmtree(source.with_name("model"))
    assert "scales" in check(source, ("frozen.weight", "frozen.bias"))["absent"]["frozen.bias"]


def test_extra_state_that_is_no_tensor_does_not_stop_a_conversion(copy: Copy) -> None:
    source = copy("zero2-bf16-w2")
    (model,) = models(source)
    edit(model, lambda state: state["module"].update({"norm._extra_state": None}))
    assert check(source, ("norm._extra_state",))["absent"]


def test_a_cloned_module_is_as_good_as_views(copy: Copy) -> None:
    source = copy("zero2-bf16-w2")
    (model,) = models(source)
    edit(
        model,
        lambda state: state.update(module={n: t.clone() for n, t in state["module"].items()}),
    )
    assert check(source)["aliases"] == {"head.weight": "embed.weight"}


def test_client_state_of_any_kind_is_passed_over(copy: Copy) -> None:
    import argparse
    import enum

    import numpy as np

    source = copy("zero2-bf16-w2")
    (model,) = models(source)
    color = enum.Enum("Color", "RED")
    globals()["Color"] = color
    color.__qualname__, color.__module__ = "Color", __name__
    client = {
        "args": argparse.Namespace(lr=1.0),
        "rng": np.random.RandomState(0).get_state(),
        "color": color.RED,
        color.RED: 1,
        "nested": {(1, (2, 3)): [object]},
    }
    edit(model, lambda state: state.update(client))
    check(source)


def test_a_stale_module_file_in_a_stage_3_tag_is_left_out(copy: Copy) -> None:
    source = copy("zero3-bf16-w2")
    shutil.copy(FIXTURES / "zero2-bf16-w2" / TAG / "mp_rank_00_model_states.pt", source / TAG)
    assert "left out" in check(source)["notes"][0]
