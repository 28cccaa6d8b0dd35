"""A checkpoint opened without converting it, against the live engine and the converted files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, ROOT, convert, corpus, live, made, root_of, same
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ckpt
from converters.errors import CheckpointError
from converters.storage import local

SOURCE = FIXTURES / "zero2-bf16-w3"
TRAINERS = [FIXTURES / "trainer-zero2", FIXTURES / "trainer-zero3"]


@pytest.mark.parametrize("save_dir", [*made(), *corpus(), *TRAINERS], ids=lambda path: path.name)
def test_every_tensor_and_its_optimizer_state_is_the_live_engines(save_dir: Path) -> None:
    truth = live(save_dir)
    with ckpt.open(root_of(save_dir)) as weights:
        assert len(weights) == len(list(weights))
        for name, value in truth.get("fp32", {}).items():
            assert same(weights[name], value.float()), name
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, value in truth.get(kind, {}).items():
                if not value.numel() or save_dir.name == "zero0-fp32":
                    continue
                state = weights.optimizer_state(name)
                if "muon" in save_dir.name and kind not in state:
                    continue
                assert same(state[kind].float(), value.float()), (kind, name)
                assert state["step"] in (2, 3)


def test_swapped_state_comes_from_nvme(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "zero3-nvme.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    save_dir = next(path for path in tmp_path.iterdir() if path.is_dir())
    weights = ckpt.open(save_dir)
    for name, value in live(save_dir)["exp_avg"].items():
        assert same(weights.optimizer_state(name)["exp_avg"], value), name


def test_what_is_opened_says_in_one_line_what_it_is() -> None:
    folder = FIXTURES / "zero2-bf16-w1"
    with ckpt.open(folder) as weights:
        count = len(weights)
        assert re.fullmatch(rf"<Opened .*zero2.*: {count} tensors, [\d.]+ [kM]?B>", repr(weights))


@pytest.mark.parametrize("name", ["zero1-bf16-w4", "zero2-bf16-w3", "zero3-fp16-w2"])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_slices_are_those_of_safetensors(name: str, framework: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "m")
    opened = ckpt.open(FIXTURES / name, framework)
    with safe_open(tmp_path / "m/model.safetensors", framework) as theirs:
        assert set(opened.keys()) == set(theirs.keys())
        for key in opened:
            ours, expected = opened.get_slice(key), theirs.get_slice(key)
            assert ours.get_shape() == expected.get_shape()
            assert ours.get_dtype() == expected.get_dtype()
            assert np.array_equal(np.asarray(opened[key]), np.asarray(theirs.get_tensor(key)))
        key = "blocks.0.up.weight"
        whole = np.asarray(theirs.get_tensor(key))
        for index in (
            np.s_[0:4],
            np.s_[2],
            np.s_[-1],
            np.s_[1:7:3],
            np.s_[:, 2:5],
            np.s_[3:6, 1],
            np.s_[...],
            np.s_[5:2],
            np.s_[-3:],
            np.s_[..., 0],
        ):
            assert np.array_equal(np.asarray(opened.get_slice(key)[index]), whole[index]), index
        with pytest.raises(IndexError):
            opened.get_slice(key)[len(whole)]


INDEXES = [
    *(np.s_[...], np.s_[()], np.s_[:], np.s_[:0], np.s_[2], np.s_[-1], np.s_[1:3], np.s_[-3:-1]),
    *(
        np.s_[::2],
        np.s_[1:9:3],
        np.s_[99:],
        np.s_[:99],
        np.s_[5:2],
        np.s_[..., ::2],
        np.s_[..., -1],
    ),
    *(np.s_[0, ...], np.s_[:, 1], np.s_[1:, -2:], np.s_[-2, ::2], np.s_[0, 0], np.s_[..., 1:3, 0]),
    *(np.s_[0:2, 1, ...], np.s_[1:2, ..., 2:], np.s_[-4:, -1, -1], [], [0, 2], np.int64(1)),
    *(np.s_[7], np.s_[-9], np.s_[0, 9], np.s_[0, 0, 0, 0]),
]
OF_TORCH = [
    None,
    True,
    False,
    np.s_[0, None],
    np.s_[..., True],
    np.s_[..., 0, ...],
    np.s_[::-1],
    1.5,
]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shape", [(5, 3, 4), (6, 2), (4,), (), (0, 3)])
def test_slices_are_torchs(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": whole}, path)
    with ckpt.open(path) as opened, ckpt.open(path, "np") as arrays:
        for index in INDEXES:
            outcomes = [
                outcome_of(tensor, index)
                for tensor in (whole, opened.get_slice("a"), arrays.get_slice("a"))
            ]
            assert outcomes[0] == outcomes[1] == outcomes[2], index
        for index in (None, True, False, (0, None), (..., True)):
            with pytest.raises(TypeError, match="is not an index of a slice"):
                arrays.get_slice("a")[index]


def outcome_of(sliced: Any, index: Any) -> Any:
    try:
        part = np.asarray(sliced[index])
    except (IndexError, ValueError, TypeError) as error:
        return IndexError if isinstance(error, (IndexError, ValueError)) else TypeError
    return part.shape, part.tolist()


@pytest.mark.parametrize("shape", [(5, 3, 4), (6, 2), (4,), (), (0, 3)])
def test_slices_are_those_of_safe_open(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)}, path)
    with ckpt.open(path) as ours, safe_open(path, "pt") as theirs:
        for index in [*INDEXES, *OF_TORCH]:
            expected = outcome_of(theirs.get_slice("a"), index)
            assert outcome_of(ours.get_slice("a"), index) == expected, index


@pytest.mark.parametrize("shape", [(5, 3, 4), (6, 2), (4,)])
def test_what_safe_open_slices_for_numpy_is_sliced_alike(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path, compared = tmp_path / "m.safetensors", 0
    save_file({"a": torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)}, path)
    with ckpt.open(path, "np") as ours, safe_open(path, "np") as theirs:
        for index in INDEXES:
            try:
                expected = theirs.get_slice("a")[index]
            except (SafetensorError, OverflowError, SystemError):
                continue  # of which we read more, as numpy does
            compared += 1
            assert np.array_equal(ours.get_slice("a")[index], expected), index
        with pytest.raises(SafetensorError):
            theirs.get_slice("a")[None]
    assert compared > 10


def test_without_torch_numpy_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    code = (
        "import sys, ckpt\n"
        "sys.modules['torch'] = None\n"
        f"for path in {[str(tmp_path / 'm.safetensors'), str(SOURCE)]!r}:\n"
        "    with ckpt.open(path) as w:\n"
        "        try: w[next(iter(w))]\n"
        "        except ckpt.CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True
    )
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2 and all('open with framework="np"' in line for line in lines)


@pytest.mark.parametrize("name", ["pt", "torch", "np", "numpy"])
def test_frameworks_have_the_names_of_safetensors(name: str) -> None:
    with ckpt.open(SOURCE, name) as opened:  # type: ignore[arg-type]
        assert isinstance(opened["norm.weight"], torch.Tensor) is (name in ("pt", "torch"))


def test_only_the_rows_asked_for_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    fill = local.read_into
    monkeypatch.setattr(
        local, "read_into", lambda fd, run, at: (read.append(len(run)), fill(fd, run, at))[1]
    )
    weights = ckpt.open(SOURCE)
    assert not read
    rows = weights.get_slice("embed.weight")[2:4]
    assert sum(read) == rows.nbytes


def test_safetensors_and_bin_files_and_folders_open_alike(tmp_path: Path) -> None:
    whole = convert(SOURCE, tmp_path / "a")
    convert(SOURCE, tmp_path / "b", "--max-shard-size", "1KB")
    convert(SOURCE, tmp_path / "c", "--format", "bin")
    convert(SOURCE, tmp_path / "d", "--format", "bin", "--max-shard-size", "1KB")
    paths = [tmp_path / "a/model.safetensors", tmp_path / "c/pytorch_model.bin"]
    for path in (*paths, *(tmp_path / name for name in "abcd")):
        with ckpt.open(path) as weights:
            assert set(weights) == set(whole)
            assert all(same(weights[name], whole[name]) for name in whole)
            with pytest.raises(CheckpointError, match="weights only"):
                weights.optimizer_state("norm.weight")


def sharded(folder: Path, weight_map: dict[str, str]) -> None:
    """Two shards, which both hold ``twice``, and an index that says where each name is."""
    for number in (1, 2):
        tensors = {f"name{number}": torch.ones(2), "twice": torch.full((2,), float(number))}
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_of_shards_the_index_says_which_counts_and_what_none_holds_is_absent(
    tmp_path: Path,
) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    weight_map = {"name1": first, "name2": second, "twice": first, "lost": second}
    sharded(tmp_path, weight_map)

    with ckpt.open(tmp_path) as opened:
        assert sorted(opened.keys()) == ["name1", "name2", "twice"]
        assert opened["twice"].tolist() == [1, 1]
        with pytest.raises(KeyError, match=f"in {second}, which does not hold it"):
            opened["lost"]


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    sharded(tmp_path, {"name1": first, "name2": second})
    save_file({"newer": torch.ones(1)}, tmp_path / "model.safetensors")

    with ckpt.open(tmp_path) as opened:
        assert list(opened.keys()) == ["newer"]


def test_what_is_opened_goes_into_a_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    source = FIXTURES / "trainer-zero3/checkpoint-2"
    config = AutoConfig.from_pretrained(source)
    with ckpt.open(source) as weights:
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32
        )
        again = AutoModelForCausalLM.from_config(config).float()
        assert not again.load_state_dict(weights).missing_keys
    for name, value in live(FIXTURES / "trainer-zero3")["fp32"].items():
        assert same(model.state_dict()[name], value) and same(again.state_dict()[name], value)


def test_names_without_values_or_state_say_why() -> None:
    weights = ckpt.open(SOURCE)
    with pytest.raises(KeyError, match="no such name"):
        weights["nothing"]
    with pytest.raises(KeyError, match="not trained"):
        weights.optimizer_state("frozen.weight")
    assert weights.metadata() == {
        "format": "pt",
        "tag": "global_step2",
        "step": "2",
        "stage": "2",
        "world_size": "3",
        "deepspeed": "0.19.8",
    }
    with pytest.raises(CheckpointError, match="optimizer's state of an fp32 run"):
        ckpt.open(FIXTURES / "zero0-fp32").optimizer_state("norm.weight")


def test_numpy_is_served_without_torch() -> None:
    code = (
        "import sys, ckpt\n"
        f"with ckpt.open({str(SOURCE)!r}, 'np') as w:\n"
        "    assert w['norm.weight'].dtype == 'float32'\n"
        "    assert w.optimizer_state('norm.weight')['exp_avg'].shape == (7,)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_what_is_planned_or_sliced_is_one_short_line(tmp_path: Path) -> None:
    planned = (
        ckpt.convert.plan(SOURCE, tmp_path / "a"),
        ckpt.reshard.plan(SOURCE, 1),
        ckpt.universal.plan_to(SOURCE),
        ckpt.open(SOURCE).get_slice("embed.weight"),
    )
    for value in planned:
        text = repr(value)
        assert text.startswith(f"<{type(value).__name__} ") and len(text) < 400, text
