"""Hostile ``.metadata`` in place of a real one: refused with one line, nothing run, within limits.

torch itself unpickles the file, which runs what it asks for.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hardening.hostile import lies
from hardening.hostile.files import Hostile
from hardening.hostile.judging import Target
from hardening.hostile.opcodes import FORMS, asked, encoded, head
from hardening.hostile.payloads import PAYLOADS
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

MARKER = "MARKER of what is put in its place"
MANY = 300_000


@pytest.fixture
def target(tmp_path: Path) -> Target:
    state = {"model": {"w": torch.ones(4, 3), "b": torch.ones(5)}}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    return Target(tmp_path / "c", ".metadata", tmp_path / "t")


def require(target: Target, hostiles: Iterator[Hostile], canary: Path) -> None:
    verdicts = [target.judge(hostile) for hostile in hostiles]
    assert not [line for line in (verdict.wrong(canary) for verdict in verdicts) if line]
    assert len(verdicts) > 5


def with_opcodes(target: Target, put: Callable[[Any], None], opcodes: bytes) -> bytes:
    """The real description with a value that is given as opcodes, where ``put`` has the marker."""
    metadata = pickle.loads(target.real)
    put(metadata)
    data = pickle.dumps(metadata, protocol=4)
    marker = encoded(MARKER, 4)
    short = b"\x8c" + bytes([len(MARKER)]) + MARKER.encode()
    found = short if short in data else marker
    assert data.count(found) == 1
    data = data.replace(found, opcodes)
    start = data.index(b"\x95")  # without the frame, whose length is another one now
    return data[:start] + data[start + 9 :]


def beside(metadata: Any) -> None:
    metadata.planner_data["model.w"] = MARKER


def as_chunks(metadata: Any) -> None:
    metadata.state_dict_metadata["model.w"].chunks = MARKER


def as_size(metadata: Any) -> None:
    metadata.state_dict_metadata["model.w"].size = MARKER


def as_tensors(metadata: Any) -> None:
    metadata.state_dict_metadata = MARKER


def as_places(metadata: Any) -> None:
    metadata.storage_data = MARKER


PLACES = (beside, as_chunks, as_size, as_tensors, as_places)


def test_no_callable_and_no_form_runs_anything(target: Target, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    def codes() -> Iterator[Hostile]:
        for number, payload in enumerate(PAYLOADS):
            opcodes = asked(PAYLOADS[payload](canary), "REDUCE", 4)
            yield Hostile("code", payload, head(4) + opcodes + b".")
            place = PLACES[number % len(PLACES)]
            yield Hostile("code", f"{payload}, inside", with_opcodes(target, place, opcodes))
        for form in FORMS:
            opcodes = asked(PAYLOADS["os.system"](canary), form, 4)
            yield Hostile("code", form, with_opcodes(target, as_places, opcodes))

    require(target, codes(), canary)


def test_torch_itself_runs_it(target: Target, tmp_path: Path) -> None:
    """So that the canaries above are live ones."""
    canary = tmp_path / "canary"
    opcodes = asked(PAYLOADS["os.system"](canary), "REDUCE", 4)
    target.path.write_bytes(head(4) + opcodes + b".")
    with pytest.raises(Exception, match="int"):
        dcp.FileSystemReader(target.folder).read_metadata()
    assert canary.exists()


def test_bombs_are_refused_in_2_s_and_64_mib(target: Target, tmp_path: Path) -> None:
    def bombs() -> Iterator[Hostile]:
        sample = list(lies.bombs().items())[::5]  # state files have all of them
        for number, (name, opcodes) in enumerate(sample):
            place = PLACES[1 + number % 4]
            yield Hostile("bomb", f"{name}, inside", with_opcodes(target, place, opcodes))

    require(target, bombs(), tmp_path / "canary")


def chunk_lists() -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Changes of what the description of a tensor says."""

    def chunks_of(count: int, offsets: Any, sizes: Any) -> Callable[[Any], None]:
        def change(metadata: Any) -> None:
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            metadata.state_dict_metadata["model.w"].chunks = [chunk] * count

        return change

    def size_of(*size: int) -> Callable[[Any], None]:
        return lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size(size))

    def place_of(**fields: Any) -> Callable[[Any], None]:
        def change(metadata: Any) -> None:
            for index, info in metadata.storage_data.items():
                if index.fqn == "model.w":
                    for name, field in fields.items():
                        setattr(info, name, field)

        return change

    yield "a chunk again and again", chunks_of(MANY, (0, 0), (4, 3))
    yield "a chunk outside", chunks_of(1, (3, 0), (4, 3))
    yield "a negative offset", chunks_of(1, (-1, 0), (4, 3))
    yield "a chunk of other axes", chunks_of(1, (0,), (4,))
    yield "no chunk", chunks_of(0, (0, 0), (4, 3))
    yield "a huge size", size_of(1 << 62, 1 << 62)
    yield "a larger size", size_of(4_000_000_000, 3)
    yield "another size", size_of(3, 4)
    yield "thousands of axes", size_of(*([1] * 5000))
    yield "a negative place", place_of(offset=-8)
    yield "a place behind the end", place_of(offset=1 << 40)
    yield "a place of no number", place_of(offset=None)
    yield "a huge item", place_of(length=1 << 50)
    yield "an empty item", place_of(length=0)
    yield "half an item", place_of(length=700)
    yield "a file above", place_of(relative_path="../__0_0.distcp")
    yield "a file elsewhere", place_of(relative_path="/etc/passwd")
    yield "a missing file", place_of(relative_path="__7_0.distcp")
    yield "no file name", place_of(relative_path=7)


def test_descriptions_that_lie_are_refused(target: Target, tmp_path: Path) -> None:
    def liars() -> Iterator[Hostile]:
        for name, change in chunk_lists():
            metadata = pickle.loads(target.real)
            change(metadata)
            yield Hostile("lie", name, pickle.dumps(metadata, protocol=4))

    require(target, liars(), tmp_path / "canary")


def test_many_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """A few bytes of a file would become any number of tensors."""
    dcp.save({"model": {"w": torch.ones(4096)}}, checkpoint_id=tmp_path / "c", no_dist=True)
    target = Target(tmp_path / "c", ".metadata", tmp_path / "t")
    metadata: Metadata = pickle.loads(target.real)
    entry = metadata.state_dict_metadata["model.w"]
    (place,) = (p for index, p in metadata.storage_data.items() if index.fqn == "model.w")
    for number in range(5_000):
        name = f"model.w{number}"
        metadata.state_dict_metadata[name] = entry
        metadata.storage_data[MetadataIndex(name, torch.Size([0]))] = place

    data = pickle.dumps(metadata, protocol=4)
    verdict = target.judge(Hostile("lie", "5,000 names", data))
    assert verdict.wrong(tmp_path / "canary") is None
    assert "share bytes of __0_0.distcp" in verdict.message
