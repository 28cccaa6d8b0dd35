"""Element types beyond the common ones: read, written, and named where there is no way to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckpt
from converters import cast
from converters.errors import CheckpointError
from converters.execute import shards
from converters.formats import pytorch_bin, safetensors
from converters.tensors import DType, Weights
from converters.torch_files import reader
from converters.torch_files.rebuild import Odd, reason

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


def test_a_bin_file_names_what_it_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    odd = ODD | {"mask": torch.eye(3).to_sparse(), "note": "text"}
    torch.save({"w": torch.ones(2)} | odd, path)
    opened = ckpt.open(path)
    assert list(opened) == ["w"]
    assert opened.absent.keys() == odd.keys()
    assert "complex128" in opened.absent["wide"]
    assert "sparse" in opened.absent["mask"]
    with pytest.raises(KeyError, match="mask: a sparse tensor, which is not read"):
        opened["mask"]


def test_a_dict_of_dicts_is_no_file_of_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="dicts of other values under state_dict"):
        ckpt.open(tmp_path / "x.bin")


def test_reasons_are_words() -> None:
    assert reason(3) == "a value of type int, not a tensor"
