"""Pickles are read fast: the short cuts do what the machine does, and records are small."""

from __future__ import annotations

import mmap
import pickle
import random
from pathlib import Path
from typing import Any

import dcp_checkpoints
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from converters.dcp import metadata
from converters.dcp.entries import records
from converters.errors import CheckpointError
from converters.pickles import interpreter, memo
from converters.pickles.values import Call
from converters.torch_files.rebuild import BUILDERS

SIZES = torch.Size([3, 70_000])
VALUES = [
    {"a": [1, 300, 70_000, -5, 1 << 40, 1 << 200, None, True, 2.5, "text"], 2: {"b": (1, (2, 3))}},
    [MetadataIndex(f"name{n % 7}", torch.Size([n, 0]), n) for n in range(400)],
    [ChunkStorageMetadata(SIZES, torch.Size([n])) for n in range(300)] + [SIZES] * 3 + [False],
]


def outcome(data: bytes) -> str:
    try:
        root = interpreter.Interpreter(data, BUILDERS, lambda identifier: identifier, "x").run()
    except CheckpointError as error:
        return f"{error.kind}: {error}"
    return written_out(root)


def written_out(value: Any, depth: int = 0) -> str:
    """A value with the states of objects, which may lead back to it."""
    if depth > 12:
        return "..."
    if isinstance(value, Call):
        state = written_out(value.state, depth + 1)
        return f"{value.of}{value.args}{state}{value.items}{value.pairs}"
    if isinstance(value, (list, tuple, dict)):
        members = value.items() if isinstance(value, dict) else value
        inner = " ".join(written_out(member, depth + 1) for member in members)
        return f"{type(value).__name__}({inner})"
    return repr(value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=["scalars", "indexes", "chunks"])
def test_short_cuts_do_what_the_machine_does(
    value: Any, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(value, protocol=protocol)
    rng = random.Random(protocol)
    pickles = [data]
    for _ in range(60):
        damaged = bytearray(data[: rng.choice((len(data), 400))])
        damaged[rng.randrange(min(400, len(damaged)))] = rng.choice(b"().}hjKMN\x81\x85\x86\x94Rub")
        pickles.append(bytes(damaged))

    fast = [outcome(data) for data in pickles]
    monkeypatch.setattr(interpreter, "TAIL_BYTES", 1 << 40)
    assert fast == [outcome(data) for data in pickles]
    assert not fast[0].startswith("corrupt")


def test_a_map_of_a_file_is_read_like_bytes(tmp_path: Path) -> None:
    data = pickle.dumps(VALUES)
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        mapped: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert outcome(mapped) == outcome(data)


def read(value: Any) -> Any:
    return metadata._interpreted(pickle.dumps(value), "x")


def test_equal_shapes_are_one_and_others_are_never_taken_for_them() -> None:
    first, second = (ChunkStorageMetadata(torch.Size([4]), torch.Size([5])) for _ in range(2))
    chunks = read([first, second])
    assert chunks[0].offsets == (4,) and chunks[0].offsets is chunks[1].offsets

    for wrong in ((True,), (4.0,), (-4,), (1 << 60,), ([4],), [4], None):
        fields = {"offsets": wrong, "sizes": (4,)}
        chunk = records.ChunkRecord()
        chunk.take(fields)
        assert chunk.offsets == records.INVALID and chunk.sizes == (4,)


def test_the_transforms_of_an_item_are_a_few_names() -> None:
    """Lists of twice a list of twice a list, which nothing may write out."""
    doubled: list[Any] = []
    for _ in range(100):
        doubled = [doubled, doubled]
    info = _StorageInfo("__0_0.distcp", 0, 1)
    object.__setattr__(info, "transform_descriptors", [doubled, "zstd", *["x"] * 1000])
    with pytest.raises(CheckpointError):
        metadata._interpreted(pickle.dumps([info, doubled]), "x")
    (record,) = read([info])
    assert record.transforms[:2] == ("?", "zstd") and len(record.transforms) == 16


def test_a_size_that_is_no_number_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path, no_dist=True)

    def change(content: Any) -> None:
        entry = content.state_dict_metadata["w"]
        entry.chunks = [*entry.chunks, ChunkStorageMetadata((True,), (0,))]

    dcp_checkpoints.edit_metadata(tmp_path, change)
    with pytest.raises(CheckpointError, match="the offsets of a chunk of w is not a tuple"):
        metadata.read(tmp_path)


def test_a_file_of_gigabytes_is_not_searched_for_what_its_short_pickles_ask_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "legacy.bin"
    path.write_bytes(b"\x80\x02j\x07\x01\x00\x00q\x00")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
        data = mmap.mmap(file.fileno(), 1 << 40, access=mmap.ACCESS_READ)

    with data:
        assert memo.requested_entries(data) == b""  # of none is anything known
    assert memo.requested_entries(b"j\x07\x01\x00\x00" + b"\x94" * 600)[0x107] == 1
