"""Files of ``torch.save`` that were captured first and written later, compared with torch's own."""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
import weakref
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, ROOT, convert, root_of, same
from torch.utils.serialization import config

from ckpt.runs.manifest import FileRecord, digest
from ckpt.state.blocks import CHUNK, Blocks
from ckpt.state.torch_file import Captured, capture
from converters import cast
from converters.storage.local import LocalWriter
from converters.torch_files import reader

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
]


def masked(path: Path) -> bytes:
    """The file without the serialization id and its CRC32s, the one thing that may differ."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[-1]
        start = archive.start_dir
    assert info.filename.endswith("/.data/serialization_id")
    assert info.file_size == 40
    payload = start - 40 - 16
    assert bytes(data[payload : payload + 40]).isdigit()
    data[payload : payload + 48] = bytes(48)
    entry = data.rfind(b"PK\x01\x02", start)
    data[entry + 16 : entry + 20] = bytes(4)
    return bytes(data)


def check(obj: Any, path: Path) -> Any:
    """Writes ``obj`` by torch and by us, requires the same bytes, and returns it loaded."""
    with config.patch({"save.storage_alignment": 4096}):
        torch.save(obj, path)
    expected = masked(path)
    path.unlink()
    captured = capture(obj)
    written = captured.write(path)
    assert masked(path) == expected
    assert written == digest(path)
    assert written.size == captured.size(path) == len(expected)
    assert written.digest == f"zip:{reader.read(path).digest}"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return torch.load(path, weights_only=False)


class Counter:
    """Something that only a pickle can hold."""

    def __init__(self) -> None:
        self.count, self.held = 3, torch.ones(2)


def everything() -> dict[str, Any]:
    base = torch.randn(300, 700)
    shared = torch.arange(20.0)
    module = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    return {
        "types": {str(dtype): torch.arange(24).reshape(2, 12).to(dtype) for dtype in DTYPES},
        "view": base[3:9, ::2],
        "transposed": base.t(),
        "whole": base,
        "again": base,
        "pair": [shared[:5], shared[5:].expand(2, 15)],
        "empty": torch.empty(0),
        "no shape": torch.tensor(3.5),
        "zero-size": torch.empty(3, 0, 2),
        "meta": torch.empty(4, 5, device="meta"),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "negative": torch.ones(3, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "storage": torch.arange(9).untyped_storage(),
        "module": module,
        "optimizer": optimizer.state_dict(),
        "large": torch.randn(CHUNK // 4 + 1001),
        "larger": torch.randn(CHUNK // 2).half()[7:],
        "plain": (1, -(2**80), 2.5, None, "ü", b"\0\xff", {1, 2}, 1j, slice(1, 2), Ellipsis),
        "ordered": OrderedDict(a=1, b=torch.zeros(1)),
        "default": defaultdict(list, a=[1]),
        "arguments": argparse.Namespace(lr=1e-3, betas=(0.9, 0.95)),
        "shape": torch.Size([1, 2]),
        "type": torch.bfloat16,
        "device": torch.device("cpu"),
        "array": torch.arange(5).numpy(),
        "object": Counter(),
        Path("key"): 1,
    }


def test_a_nest_of_everything_is_written_byte_for_byte_as_torch_writes_it(tmp_path: Path) -> None:
    obj = everything()
    loaded = check(obj, tmp_path / "state.pt")
    for name, tensor in obj["types"].items():
        assert same(loaded["types"][name], tensor)
    for name in ("view", "transposed", "whole", "large", "larger", "parameter", "zero-size"):
        assert same(loaded[name], obj[name])
    assert (
        loaded["whole"].data_ptr() == loaded["again"].data_ptr() == loaded["transposed"].data_ptr()
    )
    assert loaded["pair"][0].untyped_storage()._cdata == loaded["pair"][1].untyped_storage()._cdata
    assert loaded["plain"] == obj["plain"]
    assert loaded["object"].count == 3
    assert loaded["meta"].is_meta


@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 40), max_size=3),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=6,
    )
)
@settings(deadline=None, max_examples=40)
def test_types_shapes_and_views_are_written_as_torch_writes_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[Any, list[int], int, bool]]
) -> None:
    obj = []
    for dtype, shape, skipped, turned in tensors:
        tensor = torch.randint(0, 2, [skipped + 1, *shape]).to(dtype)[skipped:]
        obj.append(tensor.transpose(0, -1) if turned else tensor)
    loaded = check(obj, tmp_path_factory.mktemp("t") / "x.pt")
    assert all(same(*pair) for pair in zip(loaded, obj, strict=True))


@pytest.mark.parametrize("extra", [-4097, -1, 0, 1, 4095, 4096, 300_000])
def test_sizes_around_a_chunk_are_written_as_torch_writes_them(tmp_path: Path, extra: int) -> None:
    held = torch.randint(0, 255, (2, CHUNK + extra), dtype=torch.uint8)
    held[1] //= 2
    loaded = check([held[0].clone(), torch.ones(3), held[1].clone()], tmp_path / "x.pt")
    assert same(loaded[0], held[0])
    assert same(loaded[2], held[1])


@pytest.mark.parametrize("name", ["a", "a.b.pt", ".pt", "ü.pt", "a b", "a\\b.pt", "x."])
def test_the_folder_in_the_zip_is_named_as_torch_names_it(tmp_path: Path, name: str) -> None:
    if name == ".pt":  # torch refuses it
        capture([torch.ones(2)]).write(tmp_path / name)
        assert same(torch.load(tmp_path / name)[0], torch.ones(2))
    else:
        check([torch.ones(2)], tmp_path / name)


def test_thousands_of_small_tensors_are_written_as_torch_writes_them(tmp_path: Path) -> None:
    check([torch.full((i % 70,), i) for i in range(3000)], tmp_path / "x.pt")


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": True, "mmap": True}])
def test_torch_loads_it_in_every_way(tmp_path: Path, options: dict[str, Any]) -> None:
    obj = {"a": torch.randn(1000), "b": torch.ones(3, dtype=torch.bfloat16), "step": 3}
    capture(obj).write(tmp_path / "x.pt")
    with config.patch({"load.calculate_storage_offsets": bool(options)}):
        loaded = torch.load(tmp_path / "x.pt", **options)
    assert same(loaded["a"], obj["a"])
    assert same(loaded["b"], obj["b"])
    assert loaded["step"] == 3
    assert cast.load(reader.read(tmp_path / "x.pt").root["a"]).tobytes() == bytes(
        obj["a"].numpy().data
    )


@pytest.mark.parametrize("name", ["zero1-fp16-w2", "zero2-bf16-w2", "zero3-bf16-w2", "zero0-fp16"])
def test_deepspeeds_states_written_again_are_the_same_checkpoint(tmp_path: Path, name: str) -> None:
    root, copy = root_of(FIXTURES / name), tmp_path / "copy"
    shutil.copytree(root, copy)
    paths = [path for path in copy.rglob("*.pt") if zipfile.is_zipfile(path)]
    assert paths
    for path in paths:
        state = torch.load(path, weights_only=False)
        path.unlink()
        folder = tmp_path / path.name
        folder.mkdir()
        check(state, folder / path.name)
        shutil.move(folder / path.name, path)
        folder.rmdir()
    one, other = convert(root, tmp_path / "one"), convert(copy, tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(same(one[key], other[key]) for key in one)


def test_what_changes_after_the_capture_is_written_unless_it_was_replaced(tmp_path: Path) -> None:
    tensors = [torch.zeros(5000), torch.zeros(3), torch.zeros(100_000), torch.empty(0)]
    captured = capture({"t": tensors, "step": [1]})
    assert captured.nbytes == sum(t.nbytes for t in tensors)
    captured.replace(1, bytearray(bytes(captured.storages[1])))
    captured.replace(2, tensors[2].clone().untyped_storage())
    captured.replace(3, torch.empty(0).numpy().data)
    for tensor in tensors:
        tensor += 1
    captured.write(tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt")
    assert [t.unique().tolist() for t in loaded["t"]] == [[1.0], [0.0], [0.0], []]
    assert digest(tmp_path / "x.pt").size == captured.size(tmp_path / "x.pt")


class Memory(bytearray):
    """Memory of which one can tell when nobody has it any more."""


def test_a_capture_that_is_let_go_of_frees_the_storages_at_once() -> None:
    memory = Memory(4096)
    gone = weakref.ref(memory)
    captured = capture([torch.frombuffer(memory, dtype=torch.float32)])
    gc.disable()
    try:
        del memory
        assert gone() is not None
        del captured
        assert gone() is None
    finally:
        gc.enable()


def test_a_record_whose_crc32_is_zero_gets_a_digest_of_all_bytes(tmp_path: Path) -> None:
    odd = bytearray(b"\x9d\x0a\xd9\x6d")
    assert crc32(odd) == 0
    written = capture([torch.frombuffer(odd, dtype=torch.uint8)]).write(tmp_path / "x.pt")
    assert written == digest(tmp_path / "x.pt")
    assert written.kind == "sha256"


def test_a_copy_of_another_size_is_not_taken() -> None:
    with pytest.raises(ValueError, match="storage 0 has 12 bytes, its copy 8"):
        capture(torch.zeros(3)).replace(0, bytearray(8))


def test_bytes_seen_as_two_types_are_refused_as_torch_refuses_them(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    obj = [tensor, tensor.view(torch.int32)]
    with pytest.raises(RuntimeError) as theirs:
        torch.save(obj, tmp_path / "x.pt")
    with pytest.raises(RuntimeError) as ours:
        capture(obj)
    assert str(ours.value) == str(theirs.value)


def test_what_cannot_be_pickled_raises_before_there_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        capture({"a": torch.ones(1), "lock": threading.Lock()}).write(tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_stopped_leaves_nothing_new(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        raise Stop

    captured = capture(torch.zeros(CHUNK))
    (tmp_path / "x.pt").write_bytes(b"old")
    before = threading.active_count()
    with pytest.raises(Stop):
        captured.write(tmp_path / "x.pt", stop)
    assert threading.active_count() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == b"old"
    counts: list[int] = []
    captured.write(tmp_path / "x.pt", counts.append)
    assert sum(counts) == captured.size(tmp_path / "x.pt")


def run(code: str, *args: Any) -> str:
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    return done.stdout


def test_a_file_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    captured = capture(torch.ones(4 << 20))
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard_limit))
    try:
        with pytest.raises(OSError, match="File too large"):
            captured.write(tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard_limit))
    assert not list(tmp_path.iterdir())


EXTRA = """
import re, sys, torch
from pathlib import Path
from ckpt.state.torch_file import capture
def held(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
state = {"one": torch.ones(24 << 20), "many": [torch.ones(8 << 10) for _ in range(1000)]}
capture(torch.ones(1)).write(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = held("VmRSS")
print(capture(state).write(Path(sys.argv[1])).size, held("VmHWM") - before)
"""


@pytest.mark.hardening
def test_writing_128_megabytes_takes_two_chunks_of_memory(tmp_path: Path) -> None:
    size, extra = map(int, run(EXTRA, tmp_path / "x.pt").split())
    assert size > 125 << 20
    assert extra < 32 << 20


@pytest.mark.hardening
@pytest.mark.slow
def test_a_storage_of_over_4_gib_is_found_and_what_follows_it_too(tmp_path: Path) -> None:
    obj = {"huge": torch.zeros((4 << 30) + 4099, dtype=torch.uint8), "after": torch.arange(5)}
    path = tmp_path / "x.pt"
    written = write_sparsely(capture(obj), path)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    assert infos["x/data/0"].file_size == obj["huge"].nbytes
    assert infos["x/data/1"].header_offset > 1 << 32
    assert infos["x/data/1"].CRC
    loaded = torch.load(path, mmap=True)
    assert same(loaded["after"], obj["after"])
    assert loaded["huge"].shape == obj["huge"].shape
    assert digest(path) == written


def write_sparsely(captured: Captured, path: Path) -> FileRecord:
    """``captured.write`` with a hole in the file in place of the first storage, which is zero."""
    records = captured.records(path)
    first = records[4]
    assert first.name.endswith(b"/data/0")
    blocks, at = Blocks(records, captured.payloads(), {}), 0
    with open(path, "wb") as file:
        writer = LocalWriter(file.fileno())
        for block in blocks:
            if at < first.payload or at + len(block) > first.payload + first.size:
                writer.write(block, at)
            at += len(block)
    return FileRecord(at, f"zip:{blocks.digest}")
