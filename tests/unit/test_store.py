"""The door to bytes: the local store, names that are URLs, and files opened once a command."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from oracles import FIXTURES

from ckpt.cli.main import cli
from ckpt.runs.foreign import liveness
from converters.errors import CheckpointError
from converters.execute.source_files import SourceFiles
from converters.storage import open_files, stores
from converters.storage.local_store import LocalStore
from converters.storage.open_files import SharedFiles
from converters.storage.store import File, is_url, local_path
from converters.storage.stores import source_path
from converters.storage.system import limits
from converters.tensors import Extent, Listed
from tests.support.store_suite import Place, StoreSuite


class TestLocalStore(StoreSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(LocalStore(), tmp_path)


class Value:
    def __init__(self, data: bytes):
        self.data = data


@contextmanager
def counted_opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files that are opened in the block."""
    opened: list[str] = []
    real_open = os.open

    def open_and_count(path: str, *args: int) -> int:
        opened.append(Path(path).name)
        return real_open(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_and_count)
        yield opened


def files_of(tmp_path: Path, count: int) -> list[Path]:
    paths = [tmp_path / f"file-{number}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%08d" % number)
    return paths


def value_of(path: Path, form: str = "value", nbytes: int = 8) -> Value:
    def parse(file: File) -> tuple[Value, int]:
        return Value(file.read([(0, 8)])[0]), nbytes

    return open_files.parsed(path, form, parse)


@pytest.mark.parametrize("name", ["s3://bucket/run/file.pt", "hf://org/repo", "https://host/a//b"])
def test_a_url_stays_a_url_and_is_refused_by_its_name(name: str) -> None:
    assert is_url(name)
    for ask in (local_path, source_path, LocalStore().open, LocalStore().status, stores.is_file):
        with pytest.raises(CheckpointError) as raised:
            ask(name)
        assert str(raised.value).startswith(f"{name} is a URL")
        assert raised.value.kind == "unsupported"


@pytest.mark.parametrize("name", ["out/checkpoint-5", "/a/b", "c:/model", "a:b", Path("a//b")])
def test_a_path_is_no_url(name: str | Path) -> None:
    assert not is_url(name)
    assert local_path(name) == source_path(name) == Path(name)


def test_a_command_opens_and_parses_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = files_of(tmp_path, 2)
    with counted_opens(monkeypatch) as opened, open_files.once():
        value = value_of(first)
        for _ in range(3):
            assert value_of(first) is value
            assert value_of(first, "another form") is not value
            with open_files.once():  # a block inside shares what is open
                assert open_files.read_extent(Extent(first, 2, 4)) == b"0000"
            buffer = bytearray(3)
            extents = Listed([Extent(first, 7, 1), Extent(second, 7, 1), Extent(first, 0, 1)])
            open_files.read_extents(memoryview(buffer), extents)
            assert buffer == b"010"

    assert opened == ["file-0", "file-1"]


def test_all_files_are_closed_at_the_end_and_outside_of_a_command(tmp_path: Path) -> None:
    paths = files_of(tmp_path, 5)
    before = os.listdir("/proc/self/fd")
    for path in paths:
        value_of(path)
        open_files.read_extent(Extent(path, 0, 8))
    assert os.listdir("/proc/self/fd") == before

    with pytest.raises(RuntimeError), open_files.once():
        for path in paths:
            value_of(path)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 5
        raise RuntimeError
    assert os.listdir("/proc/self/fd") == before


def test_few_stay_open_and_what_is_in_use_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files_of(tmp_path, 300)
    before = len(os.listdir("/proc/self/fd"))
    with counted_opens(monkeypatch) as opened, open_files.once():
        values = [value_of(path, nbytes=open_files.MAX_KEPT_BYTES) for path in paths]
        assert len(os.listdir("/proc/self/fd")) <= before + open_files.MAX_OPEN_FILES
        assert [value_of(path) for path in paths] == values
        assert len(opened) == 300


def test_what_nobody_uses_is_kept_as_long_as_it_is_small(tmp_path: Path) -> None:
    paths = files_of(tmp_path, 3)
    with open_files.once():
        addresses = [id(value_of(path, nbytes=open_files.MAX_KEPT_BYTES // 2)) for path in paths]
        gc.collect()
        assert [id(value_of(path)) for path in paths[1:]] == addresses[1:]
        assert value_of(paths[0]).data == b"00000000"


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    (path,) = files_of(tmp_path, 1)
    with open_files.once():
        old = value_of(path)
        (tmp_path / "new").write_bytes(b"replaced")
        os.replace(tmp_path / "new", path)
        assert value_of(path).data == b"replaced"
        assert old.data == b"00000000"
        assert open_files.read_extent(Extent(path, 0, 8)) == b"replaced"
        path.unlink()
        with pytest.raises(CheckpointError, match="No such file") as raised:
            open_files.read_extent(Extent(path, 0, 8))
        assert raised.value.kind == "incomplete"


def test_what_is_made_of_files_is_made_once_until_one_is_another(tmp_path: Path) -> None:
    paths = files_of(tmp_path, 2)
    results: list[bytes] = []

    def join() -> bytes:
        results.append(b"".join(value_of(path).data for path in paths))
        return results[-1]

    def joined() -> bytes:
        return open_files.once_for([value_of(path) for path in paths], "joined", join)

    assert joined() == joined() and len(results) == 2
    with open_files.once():
        assert joined() is joined() and len(results) == 3
        (tmp_path / "new").write_bytes(b"replaced")
        os.replace(tmp_path / "new", paths[1])
        assert joined() == b"00000000replaced" and len(results) == 4
    assert joined() == results[3] and len(results) == 5


def test_other_threads_have_files_of_their_own(tmp_path: Path) -> None:
    (path,) = files_of(tmp_path, 1)
    values: list[Value] = []
    with open_files.once():
        values.append(value_of(path))
        thread = threading.Thread(target=lambda: values.append(value_of(path)))
        thread.start()
        thread.join()
    assert values[0] is not values[1]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_bytes(b"1")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (inner / "circle").symlink_to(tmp_path / "a")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")

    listed = [file.name for file in LocalStore().list(tmp_path)]
    assert listed == ["a/inner/file", "linked/inner/file"]
    assert stores.folders(tmp_path) == ["a", "linked"]
    assert stores.names(tmp_path) == ["a", "dead", "linked"]
    assert stores.is_dead_link(tmp_path / "dead") and not stores.exists(tmp_path / "dead")


def test_a_file_is_written_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    for nbytes, had_size in ((5, True), (7, False)):
        with LocalStore().open_in_place(tmp_path / "file", nbytes) as file:
            buffer = bytearray(5)
            assert (file.had_size, file.read_into(0, memoryview(buffer))) == (had_size, 5)
            file.write(b"x", 1)
            file.write_cached(memoryview(b"y"), 3)
    assert (tmp_path / "file").read_bytes() == b"1x3y5\0\0"


def test_files_are_replaced_swapped_and_made_durable(tmp_path: Path) -> None:
    store = LocalStore()
    first, second = files_of(tmp_path, 2)
    store.reserve(tmp_path / "reserved", 1 << 16)
    store.sync(tmp_path / "reserved")
    store.sync(tmp_path)
    if store.swap(first, second):
        assert (first.read_bytes(), second.read_bytes()) == (b"00000001", b"00000000")
        store.swap(first, second)

    store.replace(first, second)
    assert second.read_bytes() == b"00000000" and not first.exists()


STOCK = FIXTURES / "trainer-zero2/checkpoint-2"
# what is opened, by which thread, while somebody counts
OPENED: Counter[tuple[str, threading.Thread]] | None = None


@pytest.fixture(scope="module")
def audited() -> None:
    def count(event: str, arguments: tuple[object, ...]) -> None:
        if OPENED is not None and event == "open":
            OPENED[str(arguments[0]), threading.current_thread()] += 1

    sys.addaudithook(count)  # for good: none can be taken away again


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["show"], "zero2-bf16-w4"),
        (["to-fp32", "--dry-run"], "zero3-bf16-w4"),
        (["reshard", "--world-size", "8", "--dry-run"], "zero2-bf16-w4"),
        (["reshard", "--world-size", "3", "--stage", "2", "--dry-run"], "zero3-bf16-w4"),
        (["to-universal", "--dry-run"], "zero3-bf16-w4"),
        (["ls"], "trainer-zero2"),
        (["latest"], "trainer-zero2"),
        (["doctor"], "trainer-zero2"),
        (["verify"], "trainer-zero2"),
        (["to-fp32"], "zero3-bf16-w4"),
        (["to-fp32"], "zero2-bf16-w2"),
        (["reshard", "--world-size", "1"], "zero2-bf16-w2"),
        (["to-universal"], "zero2-bf16-w2"),
        (["to-dcp"], "zero2-bf16-w2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_opens_each_state_file_once(
    command: list[str],
    name: str,
    audited: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Once where it is planned, and once by all threads that move bytes; the proof of a universal
    folder reads more files than stay open."""
    monkeypatch.setattr(open_files, "max_open_files", lambda: 256)
    folder = shutil.copytree(FIXTURES / name, tmp_path / "source" / name)
    opened = Counter[tuple[str, threading.Thread]]()
    monkeypatch.setattr(sys.modules[__name__], "OPENED", opened)
    with contextlib.suppress(SystemExit):  # doctor found something
        cli.main(args=[command[0], str(folder), *command[1:]], standalone_mode=False)

    counts = Counter[tuple[str, bool]]()
    for (path, thread), count in opened.items():
        is_state = path.endswith(("_states.pt", "trainer_state.json"))
        if is_state and path.startswith(f"{folder}/"):
            counts[path, thread is threading.main_thread()] += count
    assert counts and set(counts.values()) == {1}, counts


def test_files_that_find_no_room_are_opened_by_each_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files_of(tmp_path, 5)
    monkeypatch.setattr(limits, "open_files", lambda: 6)
    monkeypatch.setattr(limits, "raise_open_files", lambda _: 6)
    with counted_opens(monkeypatch) as opened, closing(SharedFiles()) as shared:
        for files in (SourceFiles(shared), SourceFiles(shared)):
            for path in paths:
                files.fill(memoryview(bytearray(1)), Extent(path, 0, 1))
            files.close()
        assert [opened.count(path.name) for path in paths] == [1, 1, 1, 1, 2]

    monkeypatch.setattr(limits, "raise_open_files", lambda count: count)
    with closing(SharedFiles()) as shared:
        assert all(shared.get(path) is shared.get(path) is not None for path in paths)


def test_the_system_is_asked_for_room_for_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert limits.raise_open_files(80) == 80
        assert limits.raise_open_files(70) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_list_looks_at_each_checkpoint_as_often_as_at_one(
    audited: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whose files count steps of their own, as those of PPO do, so that each may be a copy."""
    state = json.loads((STOCK / "trainer_state.json").read_text())
    for step in range(10, 30):
        folder = shutil.copytree(STOCK, tmp_path / f"checkpoint-{step}")
        (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))

    opened = Counter[tuple[str, threading.Thread]]()
    monkeypatch.setattr(sys.modules[__name__], "OPENED", opened)
    monkeypatch.setattr(liveness, "PAUSE", 0.0)
    with contextlib.suppress(SystemExit):
        cli.main(args=["ls", str(tmp_path)], standalone_mode=False)

    counts = [count for (path, _), count in opened.items() if path.endswith("trainer_state.json")]
    assert len(counts) == 20 and max(counts) <= 2  # parsed, and compared with the others


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_nothing_lies_under_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    assert not any(
        ask(tmp_path / name) for ask in (stores.exists, stores.is_file, stores.is_folder)
    )


def test_a_bug_of_a_store_is_not_an_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(self: LocalStore, name: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(LocalStore, "status", status)
    for ask in (stores.exists, stores.is_file, stores.is_folder):
        with pytest.raises(ValueError, match="planted"):
            ask(tmp_path)


def test_the_files_of_a_folder_are_closed_before_it_is_renamed(tmp_path: Path) -> None:
    """Some systems refuse to rename what is open, and others keep its bytes when it is deleted."""
    inner, outer = tmp_path / "staged" / "a", tmp_path / "b"
    inner.parent.mkdir()
    for path in (inner, outer):
        path.write_bytes(b"x")
    with open_files.once():
        with contextlib.suppress(KeyError), open_files.releasing(inner.parent):
            for path in (inner, outer):
                with open_files.opened(path) as file:
                    assert file.size == 1
            raise KeyError
        pool = open_files._current.files.pool  # type: ignore[union-attr]
        assert list(pool.files) == [outer]
        inner.write_bytes(b"xy")
        with open_files.opened(inner) as file:
            assert file.size == 2
