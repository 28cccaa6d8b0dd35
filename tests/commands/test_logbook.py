"""What an interrupted run wrote down is not done again, unless a file has changed since."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import FIXTURES

from ckpt.folders import filenames
from ckpt.rewrite import job, output_folder, reshard, universal
from ckpt.weights.conversion import convert
from converters.errors import CheckpointError
from converters.execute import shards, small_files, workers
from converters.execute.logbook import Logbook
from converters.execute.passage import Passage
from converters.execute.shards import CheckOptions, MoveReport
from converters.plan import Plan

SOURCE = FIXTURES / "zero2-bf16-w2"
CHECKS = CheckOptions(count_specials=True)


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are written down, too."""
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan of several shards."""
    return convert.plan(SOURCE, tmp_path / "o", max_shard_size="300B").plan


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the tensors that are read."""
    make, names = workers.Worker.make, list[str]()

    def noted(self: workers.Worker, piece: workers.Piece) -> memoryview:
        names.append(piece.placement.name)
        return make(self, piece)

    monkeypatch.setattr(workers.Worker, "make", noted)
    return names


def execute(plan: Plan, folder: Path, checks: CheckOptions = CHECKS) -> MoveReport:
    return shards.execute(plan, folder, checks, logbook=Logbook(folder / filenames.LOGBOOK))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if path.name != filenames.LOGBOOK}


def test_what_is_unchanged_is_not_read_again_and_proven_all_the_same(
    plan: Plan, tmp_path: Path, moved: list[str]
) -> None:
    first = execute(plan, tmp_path)
    before = contents(tmp_path)
    moved.clear()
    progress: list[int] = []
    logbook = Logbook(tmp_path / filenames.LOGBOOK)
    second = shards.execute(plan, tmp_path, CHECKS, progress=progress.append, logbook=logbook)
    assert moved == [] and second.written == 0 and second.read == 0
    assert sum(progress) == sum(shard.nbytes for shard in plan.shards)
    assert contents(tmp_path) == before
    for name in ("checked", "unchecked", "compared", "unlike", "overflowed", "nan", "inf"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.checked > 0 and first.compared > 0


@pytest.mark.parametrize("harm", ["byte", "cut", "gone", "same bytes"])
def test_what_changed_is_compared_and_made_again(
    plan: Plan, tmp_path: Path, moved: list[str], harm: str
) -> None:
    execute(plan, tmp_path)
    before = contents(tmp_path)
    moved.clear()
    shard = plan.shards[1]
    path = tmp_path / shard.filename
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(
        {"byte": data[:-1] + b"?", "cut": data[:-1], "same bytes": data}.get(harm, b"")
    )
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # which cannot hide it
    if harm == "gone":
        path.unlink()

    report = execute(plan, tmp_path)
    assert set(moved) == {placement.name for placement in shard.placements}
    assert report.written == (0 if harm == "same bytes" else shard.nbytes)
    assert contents(tmp_path) == before
    moved.clear()
    execute(plan, tmp_path)
    assert moved == []


def test_less_that_was_looked_at_does_not_count(
    plan: Plan, tmp_path: Path, moved: list[str]
) -> None:
    execute(plan, tmp_path, CheckOptions(verify=False))
    moved.clear()
    report = execute(plan, tmp_path)
    assert moved and report.written == 0 and report.checked > 0


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"files": {"x": [1]}}', b"[" * 100_000]
)
def test_a_logbook_that_cannot_be_read_costs_time_and_no_more(
    plan: Plan, tmp_path: Path, moved: list[str], text: bytes
) -> None:
    execute(plan, tmp_path)
    path = tmp_path / filenames.LOGBOOK
    lines = [line for line in path.read_bytes().splitlines() if line]
    path.write_bytes(b"\n".join([*lines[1:], text]))
    moved.clear()
    assert execute(plan, tmp_path).written == 0
    assert set(moved) == {placement.name for placement in plan.shards[0].placements}


def test_a_line_cut_short_does_not_take_the_next_with_it(plan: Plan, tmp_path: Path) -> None:
    execute(plan, tmp_path)
    logbook = Logbook(tmp_path / filenames.LOGBOOK)
    logbook.path.write_bytes(logbook.path.read_bytes()[:-30])
    names = [shard.filename for shard in plan.shards]
    assert set(logbook.passages(True, True)) == set(names[:-1])
    logbook.enter(names[-1:], Passage(), verified=True, counted=True)
    assert set(logbook.passages(True, True)) == set(names)


def test_damage_in_the_source_is_found_though_its_shard_is_not_read_again(tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(SOURCE, source)
    plan = convert.plan(source, tmp_path / "o", max_shard_size="300B").plan
    folder = tmp_path / "f"
    folder.mkdir()
    placement = plan.shards[0].placements[0]
    extent = placement.source.extents[0]
    with open(extent.path, "r+b") as stream:
        stream.seek(extent.offset)
        stream.write(bytes(byte ^ 1 for byte in os.pread(stream.fileno(), 1, extent.offset)))
    options = CheckOptions(exact_copies=False, count_specials=True)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="CRC32"):
            execute(plan, folder, options)


def test_numbers_that_overflowed_are_refused_again(tmp_path: Path) -> None:
    plan = convert.plan(SOURCE, tmp_path / "o", max_shard_size="300B").plan
    execute(plan, tmp_path)
    path = tmp_path / filenames.LOGBOOK
    name = plan.shards[0].placements[0].name
    entries = [json.loads(line) for line in path.read_bytes().splitlines() if line]
    entries[0]["overflowed"] = {name: 3}
    path.write_bytes(b"\n".join(json.dumps(entry).encode() for entry in entries))
    with pytest.raises(CheckpointError, match="too large for"):
        execute(plan, tmp_path)
    report = execute(plan, tmp_path, CheckOptions(count_specials=True, allow_overflow=True))
    assert report.overflowed == {name: 3}


@pytest.mark.parametrize("kind", ["reshard", "universal"])
def test_a_rewriting_goes_on_without_reading_what_it_wrote(
    kind: str, tmp_path: Path, moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(name: str) -> job.Rewriting:
        if kind == "universal":
            return universal.plan_to(SOURCE, output=tmp_path / name)
        return reshard.plan(SOURCE, 3, output=tmp_path / name)

    job.execute(planned("whole"))
    total = len(moved)
    rewriting = planned("o")
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == total * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.execute(rewriting, workers=1, progress=stop)
    continuation = output_folder.continuation(rewriting)
    assert continuation is not None
    left = tmp_path / ".o.partial"
    assert (left / filenames.LOGBOOK).is_file()

    moved.clear()
    job.execute(rewriting)
    assert 0 < len(moved) < total * 0.6
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
    names = {path.relative_to(tmp_path / "o") for path in (tmp_path / "o").rglob("*")}
    assert names == {
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")
    }


def test_files_that_an_interruption_left_unfinished_are_compared(tmp_path: Path) -> None:
    plan = universal.plan_to(SOURCE).plan
    one, other = tmp_path / "one", tmp_path / "other"
    small_files.execute(plan, one)
    logbook = Logbook(other / filenames.LOGBOOK)
    other.mkdir()
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_files.execute(plan, other, workers=1, progress=stop, logbook=logbook)
    names = set(logbook.passages(True, False))
    assert 0 < len(names) < 10
    spoilt = next(iter(names))
    path = other / spoilt
    path.write_bytes(bytes(path.stat().st_size))
    assert set(logbook.passages(True, False)) == names - {spoilt}
    report = small_files.execute(plan, other, logbook=logbook)
    assert contents(one) == contents(other) and report.checked > 0
