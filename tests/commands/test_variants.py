"""Variants that no real fixture shows, made from real ones by the change that DeepSpeed made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, convert, live, run, same

from converters.execute import workers as mover

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


@pytest.mark.parametrize("name", ["zero1-bf16-w2", "zero2-bf16-w2"])
def test_frozen_tensors_of_any_stride_are_written_in_rows(
    name: str, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy(name)
    (model,) = models(source)
    base = torch.randn(70, 300).bfloat16()
    odd = {
        "frozen.transposed": base.t(),
        "frozen.channels_last": torch.randn(9, 16, 5, 5).to(memory_format=torch.channels_last),
        "frozen.steps": torch.randn(200, 40)[::2, ::3],
    }
    if name == "zero1-bf16-w2":  # more than is moved at a time
        monkeypatch.setattr(mover, "MOVE_BYTES", 1 << 14)
        odd["frozen.large"] = torch.randn(110, 130).bfloat16().t()
    edit(model, lambda state: state["module"].update(odd))
    found = convert(source, source.with_name("model"))
    for key, value in odd.items():
        assert same(found[key], value.float()), key
    again = convert(source, source.with_name("keep"), "--dtype", "keep")
    assert all(same(again[key], value) for key, value in odd.items())


def test_kinds_of_storage_that_are_not_read_stop_nothing_elsewhere(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero2-bf16-w2")
    (model,) = models(source)
    strange = torch.ones(2, dtype=torch.complex128)
    edit(model, lambda state: state.update(client=strange))
    check(source)
    edit(model, lambda state: state["module"].update(strange=strange))
    shutil.rmtree(source.with_name("model"))
    check(source, ("strange",))
    assert "absent: strange: its elements are of type complex128" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["zero1-bf16-w2", "zero2-fp32-w2", "zero3-bf16-w2", "corpus/o0_16_9_s0bf"]
)
def test_all_optimizer_files_missing_is_not_a_run_without_zero(
    name: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(name)
    for path in optimizers(source):
        path.unlink()
    run("to-fp32", source, "-o", source.with_name("m"), code=1)
    assert "has no optimizer files" in capsys.readouterr().err


def test_a_shared_modules_buffer_of_one_element_is_no_placeholder(copy: Copy) -> None:
    source = copy("zero3-bf16-w2")
    for model in models(source):
        edit(model, lambda state: state["module"].update({"again.scale": torch.ones(1)}))
    check(source)


@pytest.mark.parametrize("name", ["\ud800", "two\nlines"])
def test_a_tied_name_that_no_file_can_hold_is_refused(
    name: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by fuzzing: a traceback where the header was written."""
    source = copy("zero3-bf16-w2")
    edit(
        models(source)[0],
        lambda state: state["shared_params"].update({name: next(iter(state["module"]))}),
    )
    run("to-fp32", source, "-o", source.with_name("m"), code=1)
    assert f"holds the name {name!r}, which no file" in capsys.readouterr().err


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_shared_modules_buffer_without_elements_keeps_its_type_under_each_name(
    copy: Copy, legacy: bool
) -> None:
    """The second name, which buffer_names lacks, was taken for a frozen parameter and cast."""
    source = copy("zero2-fp32-w2")
    (model,) = models(source)
    state = torch.load(model, weights_only=False)
    empty = torch.empty(0, 7, dtype=torch.float64)
    state["module"] |= {"one.rates": empty, "two.rates": empty, "frozen.none": torch.empty(0, 7)}
    state["buffer_names"].append("one.rates")
    torch.save(state, model, _use_new_zipfile_serialization=not legacy)
    found = convert(source, source.with_name("model"))
    assert found["one.rates"].dtype == found["two.rates"].dtype == torch.float64
    assert found["frozen.none"].dtype == torch.float32


def regrouped(source: Path, groups: list[list[int]], ones: list[str], step: float) -> None:
    """Stage 0 with LayerNorm weights that are 1.0 in 16 bits and differ by ``step`` in fp32."""
    (model,) = models(source)

    def change(state: dict) -> None:
        kept = state["optimizer"]
        flat = [master for group in kept["fp32_groups"] for master in group]
        for number, name in enumerate(ones):
            state["module"][name].fill_(1.0)
            index = next(i for i, m in enumerate(flat) if m.shape == (7,) and i not in done)
            done.add(index)
            flat[index] = torch.full((7,), 1.0 + step * (number + 1))
        kept["fp32_groups"] = [[flat[i] for i in group] for group in groups]

    done: set[int] = set()
    edit(model, change)


LAYER_NORMS = ["blocks.0.ln.weight", "blocks.0.ln.bias", "blocks.0.down.bias"]


def test_equal_16_bit_values_are_told_apart_by_the_order_of_a_group(copy: Copy) -> None:
    source = copy("zero0-bf16")
    state = torch.load(models(source)[0], weights_only=False)
    sizes = [len(group) for group in state["optimizer"]["fp32_groups"]]
    groups = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    regrouped(source, groups, LAYER_NORMS, 1e-4)
    found = convert(source, source.with_name("model"))
    for number, name in enumerate(LAYER_NORMS):
        assert same(found[name], torch.full((7,), 1.0 + 1e-4 * (number + 1))), name


def test_what_nothing_tells_apart_is_refused_unless_it_makes_no_difference(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero0-bf16")
    state = torch.load(models(source)[0], weights_only=False)
    count = sum(len(group) for group in state["optimizer"]["fp32_groups"])
    alone = [[index] for index in reversed(range(count))]
    regrouped(source, alone, LAYER_NORMS, 1e-4)
    run("to-fp32", source, "-o", source.with_name("m"), code=1)
    assert "matches several 16-bit tensors equally well" in capsys.readouterr().err
    shutil.rmtree(source)
    regrouped(copy("zero0-bf16"), alone, LAYER_NORMS, 0.0)
    found = convert(source, source.with_name("model"))
    assert all(same(found[name], torch.ones(7)) for name in LAYER_NORMS)
