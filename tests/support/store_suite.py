"""What every store has to do: a class of tests, to be given a store of one's own.

class TestMyStore(StoreSuite):
    @pytest.fixture
    def place(self) -> Place:
        return Place(MyStore(...), "mine://bucket/folder")
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from converters.errors import CheckpointError
from converters.storage.store import Store, fill_exactly, read_exactly

CONTENT = random.Random(7).randbytes(100_000)


@dataclass(frozen=True)
class Place:
    """A store, and an empty folder in it; names are made by a slash."""

    store: Store
    folder: str | os.PathLike[str]

    def name(self, name: str) -> str | os.PathLike[str]:
        if isinstance(self.folder, str):
            return f"{self.folder}/{name}"
        return Path(self.folder, name)

    def put(self, name: str, content: bytes = CONTENT) -> str | os.PathLike[str]:
        with self.store.open_writer(self.name(name)) as writer:
            writer.write(content, 0)
        return self.name(name)


class StoreSuite:
    """Tests of a store; a subclass gives the fixture ``place``."""

    def test_a_file_has_its_size_and_its_name(self, place: Place) -> None:
        name = place.put("file")
        file = place.store.open(name)
        assert (file.size, file.name) == (len(CONTENT), os.fspath(name))
        file.close()

    def test_ranges_are_read_in_their_order(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        ranges = [(50_000, 10), (0, 3), (99_990, 10), (7, 0), (1, 70_000)]
        expected = [CONTENT[offset : offset + length] for offset, length in ranges]
        assert file.read(ranges) == expected
        assert file.read([]) == []
        file.close()

    def test_a_negative_offset_counts_from_the_end(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        assert file.read([(-22, 22), (-10, 4)]) == [CONTENT[-22:], CONTENT[-10:-6]]
        file.close()
        short = place.store.open(place.put("short", b"abc"))
        assert short.read([(-22, 22)]) == [b"abc"]
        short.close()

    def test_fewer_bytes_come_only_at_the_end(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        size = len(CONTENT)
        assert file.read([(size - 5, 10), (size, 1), (size + 9, 1)]) == [CONTENT[-5:], b"", b""]
        buffer = bytearray(10)
        assert file.read_into(size - 5, memoryview(buffer)) == 5
        assert buffer == CONTENT[-5:] + bytes(5)
        file.close()

    def test_a_buffer_is_filled(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        buffer = bytearray(60_000)
        assert file.read_into(1000, memoryview(buffer)) == 60_000
        assert buffer == CONTENT[1000:61_000]
        file.close()

    def test_a_file_that_is_cut_short_says_so_with_its_name(self, place: Place) -> None:
        file = place.store.open(place.put("file", b"123"))
        with pytest.raises(CheckpointError, match=r"file ends before byte 5; it is cut short"):
            read_exactly(file, 1, 4)
        with pytest.raises(CheckpointError, match=r"file ends before byte 5; it is cut short"):
            fill_exactly(file, 1, memoryview(bytearray(4)))
        file.close()

    def test_the_contents_can_be_sliced_and_searched(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        with file.contents() as content:
            assert len(content) == len(CONTENT)
            assert content[70:80] == CONTENT[70:80]
            assert content.find(CONTENT[500:520]) == CONTENT.find(CONTENT[500:520])
        file.close()

    def test_an_empty_file_is_a_file(self, place: Place) -> None:
        file = place.store.open(place.put("empty", b""))
        assert (file.size, file.read([(0, 8), (-8, 8)])) == (0, [b"", b""])
        file.close()

    def test_a_missing_file_is_an_os_error_with_its_name(self, place: Place) -> None:
        for ask in (place.store.open, place.store.status, place.store.entries):
            with pytest.raises(FileNotFoundError) as raised:
                ask(place.name("missing"))
            assert str(raised.value.filename) == os.fspath(place.name("missing"))

    def test_a_file_may_be_closed_twice(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        file.close()
        file.close()

    def test_many_threads_may_read_one_file(self, place: Place) -> None:
        file = place.store.open(place.put("file"))
        wrong: list[int] = []

        def read(start: int) -> None:
            for offset in range(start, start + 2000, 100):
                if read_exactly(file, offset, 100) != CONTENT[offset : offset + 100]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(n * 2000,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        file.close()

    def test_the_identity_changes_with_the_bytes(self, place: Place) -> None:
        name = place.put("file", b"one")
        file = place.store.open(name)
        assert file.identity == place.store.status(name).identity
        place.put("file", b"two")
        assert file.identity != place.store.status(name).identity
        file.close()

    def test_an_open_file_never_mixes_old_and_new_bytes(self, place: Place) -> None:
        file = place.store.open(place.put("file", b"1" * 1000))
        assert read_exactly(file, 0, 10) == b"1" * 10
        place.put("file", b"2" * 1000)
        with contextlib.suppress(OSError):  # a store that keeps no old versions refuses to go on
            assert read_exactly(file, 500, 10) == b"1" * 10
        file.close()

    def test_a_file_is_told_from_a_folder(self, place: Place) -> None:
        name = place.put("folder/file")
        status = place.store.status(name)
        assert (status.is_file, status.is_folder, status.size) == (True, False, len(CONTENT))
        assert abs(time.time() - status.modified_ns / 1e9) < 3600
        for folder in (place.folder, place.name("folder")):
            status = place.store.status(folder)
            assert (status.is_file, status.is_folder) == (False, True)

    def test_a_folder_says_what_is_right_in_it_in_order(self, place: Place) -> None:
        for name in ("b", "a/inner/z", "a/c", "a.b"):
            place.put(name)
        entries = [(entry.name, entry.is_folder) for entry in place.store.entries(place.folder)]
        assert entries == [("a", True), ("a.b", False), ("b", False)]
        inner = [(entry.name, entry.is_folder) for entry in place.store.entries(place.name("a"))]
        assert inner == [("c", False), ("inner", True)]

    def test_a_file_is_not_a_folder_to_look_into(self, place: Place) -> None:
        place.put("file")
        with pytest.raises(OSError):
            place.store.entries(place.name("file"))
        with pytest.raises(OSError):
            place.store.status(place.name("file/inner"))

    def test_files_are_listed_below_a_folder_in_order(self, place: Place) -> None:
        for name in ("b", "a/inner/z", "a/c"):
            place.put(name)
        listed = [(entry.name, entry.size) for entry in place.store.list(place.folder)]
        assert listed == [(name, len(CONTENT)) for name in ("a/c", "a/inner/z", "b")]

    def test_pieces_may_be_written_in_any_order(self, place: Place) -> None:
        with place.store.open_writer(place.name("file")) as writer:
            writer.write(CONTENT[50_000:], 50_000)
            writer.write(memoryview(CONTENT)[:50_000], 0)
        file = place.store.open(place.name("file"))
        assert read_exactly(file, 0, len(CONTENT)) == CONTENT
        file.close()

    def test_many_threads_may_write_one_file(self, place: Place) -> None:
        starts = range(0, len(CONTENT), 1000)
        pieces = [CONTENT[start : start + 1000] for start in starts]
        with (
            place.store.open_writer(place.name("file"), len(CONTENT)) as writer,
            ThreadPoolExecutor(4) as pool,
        ):
            list(pool.map(writer.write, pieces, starts))
        file = place.store.open(place.name("file"))
        assert read_exactly(file, 0, len(CONTENT)) == CONTENT
        file.close()

    def test_a_file_appears_whole_or_not_at_all(self, place: Place) -> None:
        place.put("file", b"old")
        with pytest.raises(RuntimeError), place.store.open_writer(place.name("file")) as writer:
            writer.write(b"new", 0)
            raise RuntimeError
        file = place.store.open(place.name("file"))
        assert read_exactly(file, 0, 3) == b"old"
        file.close()
        assert [entry.name for entry in place.store.list(place.folder)] == ["file"]
