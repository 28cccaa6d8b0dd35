"""State without pickle: what goes in comes out, in type and every bit; and random generators."""

from __future__ import annotations

import enum
import json
import math
import random
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import same
from paths import PATHS
from safetensors import safe_open
from safetensors.torch import save

from ckpt.runs.manifest import digest
from ckpt.state import plain, rng
from ckpt.state.plain_file import PlainFile
from converters.errors import CheckpointError


def equal(one: Any, other: Any) -> bool:
    """Equal in type and every bit, also within containers and in their order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        one, other = np.asarray(one), np.asarray(other)
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return equal([one.real, one.imag], [other.real, other.imag])
    if isinstance(one, dict):
        return equal(list(one.items()), list(other.items()))
    if isinstance(one, (set, frozenset)):
        return len(one) == len(other) and all(any(equal(a, b) for b in other) for a in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


DTYPES = [
    *plain.NATIVE,
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def tensor(dtype: torch.dtype, shape: list[int], turned: bool) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    held = data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return held.transpose(0, -1) if turned and shape else held


def array(dtype: str, shape: list[int]) -> np.ndarray[Any, Any]:
    found = np.dtype(dtype)
    data = tensor(torch.uint8, [math.prod(shape) * found.itemsize], False).numpy().tobytes()
    return np.frombuffer(data, found).reshape(shape)


SHAPES = st.lists(st.integers(0, 4), max_size=3)
NUMPY = ["<f4", ">f8", "<i2", "|u1", "<c16", "<f2", "<M8[ns]", "<m8[s]", "|S3"]
KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.tuples(inner, inner),
    max_leaves=4,
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.frozensets(KEYS),
    st.sets(st.binary()),
    st.builds(tensor, st.sampled_from(DTYPES), SHAPES, st.booleans()),
    st.builds(array, st.sampled_from(NUMPY), SHAPES),
    st.builds(lambda dtype: array(dtype, [1])[0], st.sampled_from(NUMPY)),
    st.builds(torch.Size, SHAPES),
    st.sampled_from([*DTYPES, torch.device("cpu"), torch.device("cuda", 3)]),
    st.text(max_size=3).map(np.str_),
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.dictionaries(st.text(), inner).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(STATES)
@settings(deadline=None, max_examples=300)
def test_what_goes_in_comes_out_in_type_and_every_bit(state: Any) -> None:
    data = plain.dumps(state)
    assert equal(plain.loads(data), state)


def test_a_file_has_the_size_and_digest_that_were_returned(tmp_path: Path) -> None:
    state = {"epoch": 3, "seen": {1, 2}, "order": torch.randperm(100), "raw": b"\0\1"}
    path = tmp_path / "extra_state_0.state"
    assert PlainFile(state, str(path)).write(path) == digest(path)
    assert equal(plain.loads(path), state)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:  # anyone can look into it
        assert json.loads(file.metadata()["ckpt"])[:3] == ["dict", "epoch", 3]
        assert same(file.get_tensor("0"), state["order"])


def test_nan_payloads_and_signs_of_zero_are_kept() -> None:
    odd = [struct.unpack("<d", bits)[0] for bits in (b"\1\0\0\0\0\0\xf4\xff", bytes(7) + b"\x80")]
    assert equal(
        plain.loads(plain.dumps([*odd, complex(odd[1], odd[0])])), [*odd, complex(*odd[::-1])]
    )


def test_more_structure_than_a_header_may_have_is_kept() -> None:
    state = {"indices": list(range(300_000)), "key": "x" * 5000}
    assert len(plain.dumps(state)) > plain.LONG
    assert plain.loads(plain.dumps(state)) == state


def test_tensors_come_back_as_values_of_their_own() -> None:
    base = torch.arange(6.0)
    state = [base, base[2:], torch.nn.Parameter(base), base.to(torch.complex64).conj()]
    loaded = plain.loads(plain.dumps(state))
    assert all(same(a, b.detach().resolve_conj()) for a, b in zip(loaded, state, strict=True))
    loaded[0] += 1
    assert same(loaded[1], base[2:])
    assert not any(held.requires_grad for held in loaded)


class Foo:
    pass


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"sampler": {"foo": [1, 2, 3, Foo()]}}, r"^x: sampler\.foo\[3\] is a Foo; give"),
        ({"a b": {2: (Foo,)}}, r"^x: \['a b'\]\[2\]\[0\] is a type; give"),
        ({"a": {Foo(): 1}}, "^x: a has a key that is a Foo; give"),
        ({"a": {("b", b"c"): 1}}, "^x: a has a key that is a bytes; give"),
        (Foo(), "^x: the state is a Foo; give"),
        ({"c": Colour.RED}, "^x: c is a Colour"),
        ([namedtuple("Pair", "a b")(1, 2)], r"^x: \[0\] is a Pair"),
        ({"d": defaultdict(list)}, "^x: d is a defaultdict"),
        ({"f": print}, "^x: f is a builtin_function_or_method"),
        ({"o": np.array([None])}, "^x: o is an ndarray"),
        ({"m": torch.empty(2, device="meta")}, r"^x: m is a tensor of torch.float32 \(.*meta\)"),
        ({"s": torch.eye(2).to_sparse()}, "^x: s is a tensor of torch.float32 .*sparse_coo"),
        ({"g": torch.Generator()}, "^x: g is a Generator"),
    ],
)
def test_what_is_no_plain_value_is_named_with_its_place(state: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        plain.dumps(state, "x")
    assert error.value.kind == "output"


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="holds itself"):
        PlainFile(state, str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "structure",
    [
        "",
        "{}",
        '{"a": 1}',
        "[]",
        "[1]",
        '["module", "os"]',
        '["tensor"]',
        '["tensor", "7"]',
        '["tensor", 0]',
        '["tensor", "0", "load", 1]',
        '["tensor", "0", "__class__", 1]',
        '["tensor", "0", "float64", -1, -1]',
        '["tensor", "0", "float64", 99]',
        '["tensor", "0", "float64", "1"]',
        '["bytes", "1"]',
        '["array", "O", "0", 1]',
        '["array", "|O", "0", 1]',
        '["array", "<f8", "0", -1]',
        '["array", "<f8", "0", 4]',
        '["array", "<f8", "0", 1, 1.0]',
        '["array", "f8,O", "0", 1]',
        '["scalar", "<f8", "00"]',
        '["scalar", "|V8", "0000000000000000"]',
        '["set", ["list"]]',
        '["dict", 1]',
        '["dict", ["list"], 1]',
        '["int", "zz"]',
        '["float", "00"]',
        '["complex", ""]',
        '["str", "ff"]',
        '["dtype", "os"]',
        '["device", "nowhere"]',
        '["Size", "a"]',
        "[" * 100_000,
        '["list",' * 5000 + "1" + "]" * 5000,
    ],
)
def test_a_hostile_structure_is_refused(structure: str) -> None:
    tensors = {"0": torch.zeros(8, dtype=torch.uint8), "1": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="damaged, or was not written by ckpt"):
        plain.loads(save(tensors, {"ckpt": structure}))


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, or was not written"):
        plain.loads(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: No such file"):
        plain.loads(tmp_path / "nothing.safetensors")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_file_cut_short_or_changed_loads_or_is_refused(data: st.DataObject) -> None:
    state = {"a": [1, "two", 3.0], "t": torch.arange(5), "n": np.arange(3), "b": b"bytes"}
    held = bytearray(plain.dumps(state))
    at = data.draw(st.integers(0, len(held) - 1))
    if data.draw(st.booleans()):
        held = held[:at]
    else:
        held[at] ^= data.draw(st.integers(1, 255))
    try:
        plain.loads(bytes(held))
    except CheckpointError as error:
        assert "\n" not in str(error)


def drawn() -> list[Any]:
    """The next numbers of every generator."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(100),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(20).tolist(),
    ]


def test_the_next_random_numbers_are_the_same_after_a_restore(tmp_path: Path) -> None:
    drawn()
    random.gauss(0, 1)  # the second of a pair is kept in the state
    np.random.randn()
    path = tmp_path / rng.NAME.format(0)
    PlainFile(rng.capture(), str(path)).write(path)
    expected = drawn()
    assert drawn() != expected
    assert rng.restore(plain.loads(path)) == []
    assert drawn() == expected


def test_the_random_state_holds_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / rng.NAME.format(1)
    PlainFile(rng.capture(), str(path)).write(path)
    expected = drawn()
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_plain import drawn, plain, rng\n"
        "rng.restore(plain.loads(Path(sys.argv[1])))\n"
        "print(drawn())\n"
    )
    command = [sys.executable, "-c", code, str(path), *PATHS, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("broken", ["python", "numpy", "torch", "devices"])
@pytest.mark.parametrize("value", [None, (1, 2), "gone"])
def test_a_damaged_random_state_changes_no_generator(broken: str, value: Any) -> None:
    before = rng.capture()
    drawn()
    state = rng.capture() | {broken: value}
    if value == "gone":
        del state[broken]
    rng.restore(before)
    expected = drawn()
    rng.restore(before)
    with pytest.raises(CheckpointError, match="the random state is damaged"):
        rng.restore(state)
    assert drawn() == expected


def test_devices_that_are_not_here_are_told(tmp_path: Path) -> None:
    state = rng.capture()
    state["devices"] = {"cuda": {"current": 0, "states": [torch.zeros(16, dtype=torch.uint8)] * 2}}
    assert rng.restore(plain.loads(plain.dumps(state))) == [
        "the random states of 2 cuda devices: there are none here"
    ]
