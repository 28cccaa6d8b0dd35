"""Element types beyond the common ones: read, written, and named where there is no way to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckpt
from converters import cast
from converters.errors import CheckpointError
from converters.execute import shards
from converters.formats import named_values, pytorch_bin, safetensors
from converters.tensors import DType, Weights
from converters.torch_files import reader
from converters.torch_files.odd_tensors import Odd, reason

BYTES = torch.arange(16, dtype=torch.uint8)
NEW = {
    name: BYTES.clone().view(getattr(torch, name)).reshape(2, -1)
    for name in ("float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2")
}
STATE = NEW | {
    "old": BYTES.clone().view(torch.float8_e4m3fn),
    "flag": torch.ones(2, dtype=torch.bool),
    "complex": torch.ones(2, dtype=torch.complex64),
    "u8": BYTES,
    "double": torch.ones(2, dtype=torch.float64),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_of(state: dict[str, torch.Tensor], folder: Path) -> Weights:
    torch.save(state, folder / "state.pt")
    file = reader.read(folder / "state.pt")
    return Weights(file.root, checksums=file.checksums)


def written(tmp_path: Path, name: str, dtype: str, shape: list[int], nbytes: int) -> Path:
    """A safetensors file of one tensor of zeros."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    head = json.dumps({"__metadata__": {"by": "hand"}, "a": entry}).encode()
    path = tmp_path / name
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(nbytes))
    return path


def test_new_types_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    plan = safetensors.plan(weights_of(STATE, tmp_path), None, 10**9, "keep")
    shards.execute(plan, tmp_path)
    save_file(STATE, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_new_types_go_through_a_bin_file(tmp_path: Path) -> None:
    shards.execute(pytorch_bin.plan(weights_of(STATE, tmp_path), None, 10**9, "keep"), tmp_path)
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    opened = ckpt.open(tmp_path / "pytorch_model.bin")
    for name, tensor in STATE.items():
        for found in (loaded[name], opened[name]):
            assert (found.dtype, found.shape, bits(found)) == (
                tensor.dtype,
                tensor.shape,
                bits(tensor),
            )


def test_new_types_are_opened_as_safe_open_opens_them(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors", metadata={"step": "7", "by": "me"})
    opened = ckpt.open(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as theirs:
        assert opened.metadata() == theirs.metadata() == {"step": "7", "by": "me"}
        assert opened.offset_keys() == theirs.offset_keys()
        assert opened.get_tensors().keys() == theirs.get_tensors().keys()
        for name in STATE:
            ours, other = opened[name], theirs.get_tensor(name)
            assert (ours.dtype, ours.shape, bits(ours)) == (other.dtype, other.shape, bits(other))
            assert opened.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
    assert cast.load(opened.ref("float4_e2m1fn_x2")).tobytes() == bits(NEW["float4_e2m1fn_x2"])


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_floats_of_eight_bits_have_torchs_values(name: str, tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(getattr(torch, name))
    ref = weights_of({"a": every}, tmp_path).tensors["a"]
    wide = torch.from_numpy(cast.rounded(cast.load(ref), DType.F32))
    assert torch.equal(wide.nan_to_num(7), every.float().nan_to_num(7))


def test_scales_and_codes_are_never_cast() -> None:
    assert not any(DType(name).floating for name in ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"))


def test_six_bit_numbers_are_read_and_written(tmp_path: Path) -> None:
    weights = safetensors.read(written(tmp_path, "six.safetensors", "F6_E2M3", [3, 8], 18))
    assert weights.tensors["a"].shape == (3, 2)
    shards.execute(safetensors.plan(weights, None, 10**9, "keep"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as theirs:
        assert theirs.get_slice("a").get_shape() == [3, 8]
    with pytest.raises(CheckpointError, match="no type for F6_E2M3; open with framework='np'"):
        ckpt.open(tmp_path / "six.safetensors")["a"]


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "message"),
    [
        ("F4", [2, 3], 3, r"a tensor F4 \(2 x 3\) has rows that end within a byte"),
        ("F3", [2, 4], 3, "elements of type F3, which safetensors 0.8 does not have"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        safetensors.read(written(tmp_path, "x.safetensors", dtype, shape, nbytes))
    assert error.value.kind == "unsupported"


ODD = {
    "wide": torch.arange(6.0).to(torch.complex128).reshape(2, 3).t(),
    "half": torch.arange(4, dtype=torch.uint8).view(torch.complex32),
    "bits": torch.arange(4, dtype=torch.uint8).view(torch.bits8),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_other_types_keep_their_bytes(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        ODD | {"w": torch.ones(2)},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    root = reader.read(tmp_path / "x.pt").root
    for name, tensor in ODD.items():
        odd = root[name]
        assert isinstance(odd, Odd)
        assert odd.kind == str(tensor.dtype).removeprefix("torch.")
        assert odd.raw.shape == (*tensor.shape, tensor.itemsize)
        assert cast.load(odd.raw).tobytes() == bits(tensor)
    assert bits(torch.ones(2)) == cast.load(root["w"]).tobytes()


SPARSE = {
    "coo": torch.eye(3).to_sparse(),
    "uncoalesced": torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (4,)),
    "complex": torch.eye(2, dtype=torch.complex128).to_sparse(),
    **{
        name: getattr(torch.eye(4), f"to_sparse_{name}")(*([(2, 2)] if name[0] == "b" else []))
        for name in ("csr", "csc", "bsr", "bsc")
    },
}
MORE = {
    "bits16": BYTES.clone().view(torch.bits16),
    "bits4x2": BYTES.clone().view(torch.bits4x2),
    "scalar": torch.tensor(1 + 2j, dtype=torch.complex128),
    "nothing": torch.empty(0, 3, dtype=torch.complex128),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_bin_file_gives_what_torch_load_gives(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    state = SPARSE | {"wide": ODD["wide"]}
    if not legacy:  # of others torch does not read the old form
        state = STATE | ODD | MORE | state
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    loaded, opened = torch.load(path, weights_only=True), ckpt.open(path)
    assert list(opened) == list(loaded) and not opened.absent
    for name, expected in loaded.items():
        found: Any = opened[name]
        assert (found.dtype, found.shape, found.layout) == (
            expected.dtype,
            expected.shape,
            expected.layout,
        )
        if expected.layout is torch.strided:
            assert bits(found) == bits(expected), name
        else:
            assert torch.equal(found.to_dense(), expected.to_dense()), name
            assert expected.layout is not torch.sparse_coo or (
                found.is_coalesced() == expected.is_coalesced()
            )


def test_an_unusual_tensor_is_sliced_and_renamed_like_others(tmp_path: Path) -> None:
    torch.save({"m.wide": ODD["wide"], "m.w": torch.ones(2)}, tmp_path / "x.bin")
    with ckpt.open(tmp_path / "x.bin", strip="m.") as opened:
        assert sorted(opened) == ["w", "wide"]
        part = opened.get_slice("wide")
        assert (part.get_shape(), part.get_dtype()) == ([3, 2], "complex128")
        assert torch.equal(part[1:, 0], ODD["wide"][1:, 0])
        assert part[None].shape == (1, 3, 2)
    sliced = ckpt.open(tmp_path / "x.bin", "np").get_slice("m.wide")
    with pytest.raises(TypeError, match="None is not an index"):
        sliced[None]


def test_numpy_has_complex_numbers_and_names_what_it_has_not(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(ODD | {"mask": torch.eye(3).to_sparse()}, path)
    opened = ckpt.open(path, "np")
    assert np.array_equal(opened["wide"], ODD["wide"].numpy())
    for name, kind in (("half", "complex32"), ("bits", "bits8"), ("mask", "sparse")):
        with pytest.raises(CheckpointError, match=rf'{name} is a .* {kind}, .*framework="pt"'):
            opened[name]


def test_what_is_not_read_is_listed_and_refused_by_name(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    meta = torch.empty(2, device="meta")
    torch.save({"w": torch.ones(2), "q": quantized, "m": meta, "n": "text"}, tmp_path / "x.bin")
    opened = ckpt.open(tmp_path / "x.bin", "np")
    assert list(opened) == ["w", "q", "m"] and list(opened.absent) == ["n"]
    assert opened.metadata() == {"format": "pt", "n": "text"}
    for name, kind in (("q", "qint8"), ("m", "meta")):
        with pytest.raises(CheckpointError, match=f"{name} is a tensor of the kind {kind}"):
            opened[name]
    with pytest.raises(KeyError, match="n: a value of type str, not a tensor"):
        opened["n"]


def test_a_sparse_tensor_whose_parts_do_not_fit_is_an_error(tmp_path: Path) -> None:
    broken = torch.sparse_coo_tensor([[7]], [1.0], (2,), check_invariants=False)
    torch.save({"a": broken}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="a: a sparse tensor whose parts do not fit"):
        ckpt.open(tmp_path / "x.bin")["a"]


def test_tensors_in_dicts_have_dotted_names(tmp_path: Path) -> None:
    inner = {"w": torch.ones(2), "deeper": {"b": torch.zeros(3)}}
    values = {"epoch": 3, "state_dict": inner, "states": [{"m": torch.ones(1)}], "loss": [1, 2]}
    torch.save(values | {"by_number": {7: torch.ones(4)}}, tmp_path / "x.pt")
    with ckpt.open(tmp_path / "x.pt") as opened:
        names = ["state_dict.w", "state_dict.deeper.b", "states.0.m", "by_number.7"]
        assert list(opened) == names
        assert torch.equal(opened["by_number.7"], torch.ones(4))
        assert opened.metadata() == {"format": "pt", "epoch": "3", "loss": "[1, 2]"}
        assert opened.absent == {
            "epoch": "a value of type int, not a tensor",
            "loss": "a value of type list, not a tensor",
        }
    with ckpt.open(tmp_path / "x.pt", select="state_dict.*") as chosen:
        assert list(chosen) == names[:2]


def test_what_lies_too_deep_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_values, "MAX_DEPTH", 20)
    value: Any = {"w": torch.ones(1)}
    for _ in range(named_values.MAX_DEPTH + 2):
        value = {"a": value}
    torch.save({"near": torch.ones(1), "far": value}, tmp_path / "x.pt")
    with ckpt.open(tmp_path / "x.pt") as opened:
        assert list(opened) == ["near"]
        assert list(opened.absent.values()) == ["a value of type dict, not a tensor"]


def test_containers_that_are_shared_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_values, "MAX_VISITS", 1000)
    value: Any = {"w": torch.ones(1)}
    for _ in range(20):
        value = {"a": value, "b": value}
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds over 1,000 values"):
        ckpt.open(tmp_path / "x.pt")


def test_reasons_are_words() -> None:
    assert reason(3) == "a value of type int, not a tensor"
