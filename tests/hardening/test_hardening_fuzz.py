"""Random input to every reader: an answer or ``CheckpointError``, never anything else."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
from hardening.fuzz import mutation, trees
from hardening.fuzz.layout import NAMES, Layout
from hardening.fuzz.targets import TARGETS, fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.storage import open_files

SEEDS = mutation.seeds()
REPLACEMENTS = 8  # of one value in each checkpoint; in all of them together, of every kind
QUICK = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])

_ints = st.integers(0, 255)
_bare = b"().012NQR\x81\x88\x89\x8f\x90\x91\x92\x93]}abdelostu"


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


_opcodes = st.one_of(
    st.sampled_from([bytes([op]) for op in _bare]),
    st.builds(lambda op, n: bytes([op, n]), st.sampled_from(b"Kqhj\x80\x82"), _ints),
    st.text("aé\n", max_size=3).map(_text),
    st.builds(lambda n: b"\x8a" + bytes([len(n)]) + n, st.binary(max_size=10)),
    st.sampled_from(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch._utils\n_rebuild_tensor_v3\n",
            b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"ctorch\nFloatStorage\n",
            b"ctorch\nSize\n",
            b"ctorch\nTensor\n",
            b"ctorch\nfloat16\n",
            b"ccollections\nOrderedDict\n",
            b"c_codecs\nencode\n",
            b"cbuiltins\nset\n",
            b"ix\ny\n",
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ",
        ]
    ),
)


@given(st.lists(_opcodes, max_size=40).map(b"".join))
@settings(QUICK, max_examples=300)
def test_any_opcodes_give_a_value_or_an_error(opcodes: bytes) -> None:
    assert fails(TARGETS["pickle"], opcodes + b".") is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F31", 5]),
        "shape": st.lists(st.integers(-1, 3) | st.just(1 << 63), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    }
)


@given(st.dictionaries(st.sampled_from("abc"), _entry | _json, max_size=3), st.integers(0, 40))
@QUICK
def test_any_header_of_safetensors_gives_tensors_or_an_error(header: dict, length: int) -> None:
    import json

    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(length)
    assert fails(TARGETS["safetensors"], data) is None


@given(
    st.dictionaries(st.sampled_from(["weight_map", "x"]), _json | st.dictionaries(st.text(), _json))
)
@QUICK
def test_any_index_names_shards_or_gives_an_error(index: dict) -> None:
    import json

    assert fails(TARGETS["index"], json.dumps(index).encode()) is None


@given(st.data())
@QUICK
def test_a_manifest_with_any_field_replaced_is_read_or_refused(data: st.DataObject) -> None:
    import json

    held = json.loads(SEEDS["manifest"][0])
    held[data.draw(st.sampled_from(sorted(held)))] = data.draw(_json)
    assert fails(TARGETS["manifest"], json.dumps(held).encode()) is None


@pytest.mark.parametrize("name", TARGETS)
def test_real_files_changed_a_little_are_read_or_refused(name: str) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        data = mutation.mutated(rng.choice(SEEDS[name]), rng)
        wrong = fails(TARGETS[name], data)
        assert wrong is None, (seed, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_state_files_with_odd_values_are_read_or_refused(name: str, tmp_path: Path) -> None:
    layout = Layout(name, tmp_path)
    with open_files.once():  # the files that are as they were are parsed once
        for seed in range(20):
            wrong = layout.tried(seed)
            assert wrong is None, (seed, wrong)


@pytest.mark.parametrize("name", trees.NAMES)
def test_state_files_with_one_value_replaced_are_read_or_refused(name: str, tmp_path: Path) -> None:
    checkpoint = trees.Trees(name, tmp_path)
    with open_files.once():  # the files that are as they were are parsed once
        for path, place, value in islice(checkpoint.every(random.Random(name)), REPLACEMENTS):
            wrong = checkpoint.tried(path, place, value)
            assert wrong is None, (path.name, place, value, wrong)


FOUND = [("zero3-bf16-w2", 3019362021529)]  # by harden.py: a tied name of half a character


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_was_found_once_is_read_or_refused(name: str, seed: int, tmp_path: Path) -> None:
    assert Layout(name, tmp_path).tried(seed) is None
