"""torch.save files of every kind, read without torch and compared with what torch saved."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters import cast
from converters.detect import detect
from converters.errors import CheckpointError
from converters.pickles.values import Call, Global
from converters.tensors import TensorRef
from converters.torch_files import reader, torch_file

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
]


def saved(tmp_path: Path, obj: Any, **options: Any) -> torch_file.TorchFile:
    torch.save(obj, tmp_path / "x.pt", **options)
    return reader.read(tmp_path / "x.pt")


def equal(ref: TensorRef, tensor: torch.Tensor) -> bool:
    expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return cast.load(ref).tobytes() == expected and ref.shape == tuple(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_element_type_is_located(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    file = saved(tmp_path, {"a": tensor}, _use_new_zipfile_serialization=not legacy)
    assert equal(file.root["a"], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_protocol_of_pickles_is_read(tmp_path: Path, protocol: int, legacy: bool) -> None:
    tensor = torch.arange(6.0)
    content = {"a": tensor, "text": "x" * 70_000, "raw": b"y" * 300, "parts": (1, 2.5, {3})}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    file = saved(tmp_path, content, **options)
    assert equal(file.root["a"], tensor)
    assert [file.root[name] for name in ("text", "raw")] == [content["text"], content["raw"]]
    assert detect(tmp_path / "x.pt").kind.name == "torch-file"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_parameters_and_odd_strides_are_located(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    held = {
        "view": base[1],
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2],
        "expanded": torch.arange(3.0).expand(2, 3),
        "scalar": base[0, 0, 1],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[2]),
        "one": torch.ones(1, 1, 1).transpose(0, 2),
        "again": base[1],
    }
    file = saved(tmp_path, held, _use_new_zipfile_serialization=not legacy)
    for name, tensor in held.items():
        assert equal(file.root[name], tensor.detach()), name
    assert file.root["view"].extents == file.root["again"].extents


def test_attributes_of_tensors_are_kept(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.ds_id = "0_5"
    assert saved(tmp_path, [tensor]).root[0].attributes == {"ds_id": "0_5"}


class Plain:
    pass


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unknown_classes_become_records(tmp_path: Path, protocol: int) -> None:
    plain = Plain()
    plain.__dict__ = {"x": 1, "y": [2.5, None, True, "é", b"raw", 1 << 70]}
    state = {
        "plain": plain,
        "set": {1, 2},
        "frozen": frozenset({3}),
        "array": np.arange(3),
        "ordered": OrderedDict(a=1),
        ("a", 1): "tuple key",
        ((1, 2), 3): "deep key",
        torch.float16: Path("x"),
        "tensor": torch.arange(3.0),
    }
    file = saved(tmp_path, state, pickle_protocol=protocol)
    assert isinstance(file.root["plain"], Call)
    assert file.root["plain"].state == {"x": 1, "y": [2.5, None, True, "é", b"raw", 1 << 70]}
    assert file.root["set"] == {1, 2} and file.root["frozen"] in ({3}, file.root["frozen"])
    assert file.root["ordered"] == {"a": 1}
    assert file.root["a", 1] == "tuple key"
    assert file.root[Global("torch", "float16")]
    assert equal(file.root["tensor"], torch.arange(3.0))


def test_a_tensor_subclass_is_named_not_guessed(tmp_path: Path) -> None:
    class Special(torch.Tensor):
        pass

    globals()["Special"] = Special
    Special.__qualname__ = "Special"
    found = saved(tmp_path, {"a": torch.ones(2).as_subclass(Special)}).root["a"]
    assert isinstance(found, Call) and found.of.name == "Special"


def test_crcs_that_the_writer_left_out_are_none_not_right(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    with config.patch({"save.compute_crc32": False}):
        file = saved(tmp_path, torch.ones(4))
    assert [checksum.crc32 for checksum in file.checksums] == [None]


def test_a_file_that_is_none_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for data, said in (
        (b"", "is empty"),
        (b"hello, world", "is not a file of torch.save"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or cut short"),
        ((2).to_bytes(8, "little") + b'{"a|b": {}}' + b" " * 20, "DataStates"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=said):
            reader.read(path)
    with pytest.raises(CheckpointError, match="No such file"):
        reader.read(tmp_path / "missing.pt")


class Node:
    """An object that leads back to itself, as many programs have them."""

    def __init__(self) -> None:
        self.me, self.all = self, [self]


def test_objects_that_lead_back_to_themselves_are_carried_along(tmp_path: Path) -> None:
    node = Node()
    root = saved(tmp_path, {"a": node, "b": [node] * 3}).root
    assert root["a"] is root["b"][2] and root["a"].state["me"] is root["a"]


def test_a_value_named_many_times_is_one_value(tmp_path: Path) -> None:
    value: Any = {"lr": (0.1, [1, 2])}
    for _ in range(20):
        value = [value, value]
    root = saved(tmp_path, value).root
    assert root[0] is root[1]


@pytest.mark.parametrize("depth", [40, 200])
def test_values_that_unfold_without_end_are_refused(tmp_path: Path, depth: int) -> None:
    value: Any = []
    for _ in range(depth):
        value = {"a": value, "b": value}
    with pytest.raises(CheckpointError, match="counted as often as it is named") as error:
        saved(tmp_path, {"client": value})
    assert error.value.kind == "refused"


def test_what_lies_in_itself_is_refused_without_an_accusation(tmp_path: Path) -> None:
    """Python programs have such values, and ``torch.load(weights_only=True)`` reads them."""
    in_list: list[Any] = [1]
    in_list.append((in_list,))
    in_dict: dict[str, Any] = {}
    in_dict["parent"] = {"child": in_dict}
    for value in (in_list, in_dict):
        with pytest.raises(CheckpointError, match="that lies in itself, which ckpt does") as error:
            saved(tmp_path, {"client": value})
        assert error.value.kind == "unsupported" and "do not load" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.qint8], ids=str)
def test_tensors_of_types_that_are_not_read_are_carried_along(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    quantized, value = dtype == torch.qint8, torch.zeros(4)
    value = torch.quantize_per_tensor(value, 1, 0, dtype) if quantized else value.to(dtype)
    assert isinstance(saved(tmp_path, {"a": value}).root["a"], Call)
