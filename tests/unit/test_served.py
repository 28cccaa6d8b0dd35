"""A shard as a file: the bytes that ``shards`` writes, in any order, and the same proof."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub.utils._lfs import SliceFileObj
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import FIXTURES
from run_folders import real, small

from ckpt.hub import journal as journals
from ckpt.hub import select
from ckpt.hub.client import repository
from ckpt.hub.content.items import Item
from ckpt.weights.conversion import convert
from converters.errors import CheckpointError
from converters.execute import prefetch, shards, virtual_file, workers
from converters.execute.virtual_file import ServedShard, Serving
from converters.formats import pytorch_bin
from converters.plan import Plan, Shard
from converters.zero import checkpoint

SOURCE = FIXTURES / "trainer-zero3/checkpoint-2"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 256 bytes, so that a tensor takes many."""
    monkeypatch.setattr(workers, "MOVE_BYTES", 256)


def plan_of(source: Path, dtype: str = "fp32", limit: int = 20_000) -> Plan:
    return convert.prepare(source, dtype=dtype, max_shard_size=limit).plan


def written(plan: Plan, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    shards.execute(plan, folder)
    return {shard.filename: (folder / shard.filename).read_bytes() for shard in plan.shards}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1000, 1 << 20, -1])
@pytest.mark.usefixtures("small_pieces")
def test_what_is_read_is_what_is_written(dtype: str, size: int, tmp_path: Path) -> None:
    plan = plan_of(SOURCE, dtype)
    files, serving = written(plan, tmp_path / "files"), Serving(plan)
    for shard in plan.shards:
        with serving.open(shard) as file:
            found = b"".join(iter(lambda file=file: file.read(size), b""))
            file.check()
        assert found == files[shard.filename]
    report = serving.check()
    assert report.checked == sum(checksum.extent.length for checksum in plan.checksums)
    assert report.compared == sum(p.copy is not None for p in plan.placements()) > 0


def test_threads_that_get_no_memory_fail_what_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stayed full of holes, and a served shard was waited for without an end."""

    def refuse(nbytes: int) -> memoryview:
        raise MemoryError(nbytes)

    monkeypatch.setattr(workers.memory, "zeros", refuse)
    plan = plan_of(SOURCE)
    with pytest.raises(MemoryError):
        shards.execute(plan, tmp_path)
    with Serving(plan).open(plan.shards[0]) as file, pytest.raises(MemoryError):
        file.read()


@given(places=st.lists(st.tuples(st.integers(0, 26_000), st.integers(0, 3000)), max_size=20))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_any_place_may_be_read_at_any_time(
    places: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MOVE_BYTES", 256)
    plan = plan_of(SOURCE, limit=10**9)
    folder = tmp_path / "files"
    (expected,) = written(plan, folder).values() if not folder.exists() else _read(folder)
    with Serving(plan).open(plan.shards[0]) as file:
        for at, length in places:
            assert file.seek(at) == file.tell() == at
            buffer = bytearray(length)
            count = file.readinto(buffer)
            assert buffer[:count] == expected[at : at + length]
        assert file.seek(0, os.SEEK_END) == len(expected) and file.read() == b""
        file.seek(0)
        assert file.read() == expected
        file.check()


def _read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


def test_parts_are_read_as_the_hub_client_reads_them() -> None:
    plan = plan_of(SOURCE, limit=10**9)
    with Serving(plan).open(plan.shards[0]) as file:
        whole = file.read()
        parts = []
        for start in range(0, len(whole), 5000):
            with SliceFileObj(file, seek_from=start, read_limit=5000) as part:
                parts.append(b"".join(iter(lambda part=part: part.read(999), b"")))
        assert b"".join(parts) == whole
        assert isinstance(file, io.BufferedIOBase) and file.readable() and file.seekable()


def test_a_shard_that_was_not_read_to_its_end_is_not_proven() -> None:
    plan = plan_of(SOURCE)
    with Serving(plan).open(plan.shards[0]) as file:
        file.read(3000)
        with pytest.raises(CheckpointError, match="was not read to its end"):
            file.check()


def damage(folder: Path, name: str = "lm_head.weight") -> None:
    extent = checkpoint.read(folder).weights.tensors[name].extents[-1]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset + 1)
        byte = file.read(1)[0]
        file.seek(extent.offset + 1)
        file.write(bytes([byte ^ 1]))  # too little to change the rounded copy


def test_a_wrong_crc32_is_found_when_all_was_read(tmp_path: Path) -> None:
    source = shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    plan = plan_of(source)
    damage(source)
    serving = Serving(plan)
    for shard in plan.shards:
        with serving.open(shard) as file:
            file.read()
            file.check()
    with pytest.raises(CheckpointError, match="is damaged"):
        serving.check()


def test_bytes_that_change_between_two_reads_are_an_error(tmp_path: Path) -> None:
    source = shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    plan = plan_of(source, limit=10**9)
    with Serving(plan).open(plan.shards[0]) as file:
        file.read()
        file.check()
        damage(source)
        file.seek(0)
        with pytest.raises(CheckpointError, match=r"changed while lm_head\.weight was sent"):
            file.read()


def test_a_copy_with_other_values_and_an_overflow_are_refused(tmp_path: Path) -> None:
    source = shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    extent = checkpoint.read(source).weights.tensors["lm_head.weight"].extents[0]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset)
        file.write(b"\0\0\x80\x4f")  # 2**32 as fp32
    for dtype, words in ("fp32", "damaged|other values"), ("fp16", "too large for"):
        plan = plan_of(source, dtype, 10**9)
        with Serving(plan).open(plan.shards[0]) as file:
            file.read()
            with pytest.raises(CheckpointError, match=words):
                file.check()


@pytest.mark.usefixtures("small_pieces")
def test_closing_early_ends_the_threads() -> None:
    def alive() -> int:
        return sum(thread.name == "served" for thread in threading.enumerate())

    plan = plan_of(SOURCE)
    before = alive()
    file = Serving(plan).open(plan.shards[0])
    file.read(3000)
    assert alive() > before
    file.close()
    assert alive() == before
    with pytest.raises(ValueError, match="closed"):
        file.read()
    left = Serving(plan).open(plan.shards[0])
    left.read(3000)
    del left  # nobody closes it
    end = time.monotonic() + 5
    while alive() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert alive() == before


def test_a_shard_whose_header_needs_its_bytes_is_not_served() -> None:
    weights = checkpoint.read(SOURCE).weights
    plan = pytorch_bin.plan(weights, None, 10**9, "keep")
    with pytest.raises(ValueError, match="cannot be served"):
        Serving(plan).open(plan.shards[0])
    assert virtual_file.MEMORY <= 32 << 20


def test_the_proof_goes_on_where_an_interrupted_push_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = shutil.copytree(SOURCE, tmp_path / "checkpoint-2")
    plan = plan_of(source)
    first = Serving(plan)
    journal = journals.opened(plan, first)
    _pass(first, plan.shards[0])
    journal.note(plan.shards[0].filename, "ab" * 32, first)
    half = first.open(plan.shards[1])
    half.read(3000)  # killed here: what passed of it proves nothing
    half.close()
    again = Serving(plan)
    found = journals.opened(plan, again)
    assert found.sha256 == {plan.shards[0].filename: "ab" * 32} and not found.proven
    damage(source, plan.shards[1].placements[-1].name)
    _pass(again, plan.shards[1])
    with pytest.raises(CheckpointError, match="is damaged"):
        again.check()


def _pass(serving: Serving, shard: Shard) -> None:
    with serving.open(shard) as file:
        assert isinstance(file, ServedShard)
        file.read()
        file.check()


def test_only_weights_of_an_older_push_are_stale() -> None:
    held = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"]
    held += ["pytorch_model.bin", "model-extra.safetensors", "a/model.safetensors", "optimizer.pt"]
    held += ["adapter_model.bin", "model.safetensors"]
    sent = {"model.safetensors", "config.json"}
    assert repository.stale(held, sent) == [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert repository.stale(held, {"adapter_model.safetensors"}) == ["adapter_model.bin"]
    assert repository.stale(held, {"a/model-00001-of-00001.safetensors"}, "a/") == [
        "a/model.safetensors"
    ]
    assert repository.stale(held, {"config.json"}) == []


def test_retention_counts_steps_and_touches_nothing_else() -> None:
    names = ["main", "step-1", "step-9", "step-10", "step-11", "step-x", "run/step-2", "step-08"]
    assert repository.outdated(names, "step-10", 2) == ["step-08", "step-1"]
    assert repository.outdated(names, "step-10", 1) == ["step-9", "step-08", "step-1"]
    assert repository.outdated(names, "step-10", 9) == []
    assert repository.outdated(names, "run/step-5", 1) == ["run/step-2"]
    for name, keep in ("main", 1), ("step-10", 0), ("v5", 1):
        with pytest.raises(ValueError, match="step-500"):
            repository.outdated(names, name, keep)


def test_a_file_is_known_by_its_digest_or_by_its_blob(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"{}\n")
    item = Item("a.json", path)
    # git hash-object of these three bytes
    blob = "0967ef424bce6791893e9a57bb952f80fd536e93"
    assert repository.git_blob(path) == repository.git_blob(b"{}\n") == blob
    digest = repository.sha256(path)
    assert repository.RemoteFile(3, None, blob).is_content(item.nbytes, digest, path)
    assert not repository.RemoteFile(3, None, blob[::-1]).is_content(3, digest, path)
    assert repository.RemoteFile(3, digest, "pointer").is_content(3, digest, None)
    assert not repository.RemoteFile(4, digest, "pointer").is_content(3, digest, None)


def test_the_second_best_may_be_asked_for_and_a_checkpoint_is_itself(tmp_path: Path) -> None:
    for step, loss in (1, 0.2), (2, 0.1), (3, float("nan")):
        small(tmp_path, step, {"loss": loss})
    real(tmp_path, 4, {"loss": 0.3})
    small(tmp_path, 5, {"loss": 0.0}, tier="weights")
    assert select.chosen(tmp_path, ("loss", "min", 1)).checkpoint.step == 5
    assert select.chosen(tmp_path, ("loss", "min", 2), full=True).checkpoint.step == 1
    assert select.chosen(tmp_path).checkpoint.step == 5
    assert select.chosen(tmp_path, full=True).checkpoint.step == 4
    with pytest.raises(CheckpointError, match="is one checkpoint"):
        select.chosen(tmp_path / "checkpoint-1", ("loss", "min", 1))


class Roomless(workers.Worker):
    """There is no memory for its buffers."""

    def __init__(self, mover: workers.Mover):
        raise MemoryError("8 MiB")


def test_threads_without_memory_for_their_buffers_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ended without a word, and the shard had zeros in the place of all tensors."""
    plan = plan_of(SOURCE)
    for module in (workers, prefetch):
        monkeypatch.setattr(module, "Worker", Roomless)
    with pytest.raises(MemoryError):
        written(plan, tmp_path / "files")
    with Serving(plan).open(plan.shards[0]) as file, pytest.raises(MemoryError):
        file.read()
