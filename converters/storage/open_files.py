"""The files that a command reads: each is opened once, and parsed once.

    with open_files.once():            the block of a command; blocks inside share it
        open_files.opened(path)          a File: the one that is open, or a new one
        open_files.parsed(path, ...)     what it was parsed to, or a parse of it

Outside of such a block, and in other threads than its own, files are opened and closed
by each call. What stays open is bounded, and so is what is kept of files that nobody
uses; what somebody uses is found again in any case. A file that was replaced meanwhile
is opened and parsed again.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

from converters.errors import CheckpointError
from converters.storage import stores
from converters.storage.store import File, fill_exactly, read_exactly, scatter_exactly
from converters.storage.system import limits
from converters.tensors import Extent, Extents, Strided

MAX_OPEN_FILES = 64
MAX_SHARED_FILES = 16384  # open at once: every tensor of 4,096 ranks lies in that many files
_OTHER_FILES = 256  # of the process: outputs, files of each thread, and those of a training
MAX_KEPT_BYTES = 8 << 20  # of pickles whose values are kept: about 6 times as much in memory
MAX_SMALL_BYTES = 64  # of a value that is kept for as long as the command runs
MAX_SMALL_VALUES = 1 << 16
MAX_EXAMPLES = 12  # files that others are like: of the model and the optimizer, of a source
# and of what is made of it, in two forms; and their directories
_Value = TypeVar("_Value")


class FilePool:
    """Open files, of which the longest unused is closed where they become too many.

    Each comes from the store that keeps it. A file that was got is good until the next
    one is.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[Path, File] = OrderedDict()
        self.max_open_files = max_open_files()

    def get(self, path: Path) -> File:
        """The file, open; ``OSError`` if it cannot be opened."""
        if path in self.files:
            self.files.move_to_end(path)
        else:
            if len(self.files) >= self.max_open_files:
                self.files.popitem(last=False)[1].close()
            self.files[path] = stores.opener_of(path).open(path)

        return self.files[path]

    def drop(self, path: Path) -> None:
        """Closes a file, if it is open."""
        if path in self.files:
            self.files.pop(path).close()

    def close(self) -> None:
        """Closes all of them."""
        while self.files:
            self.files.popitem()[1].close()


def max_open_files() -> int:
    """The number of files that a thread may hold open,
    fewer where the process may open few."""
    open_limit = limits.open_files()
    return MAX_OPEN_FILES if open_limit < 0 else max(4, min(MAX_OPEN_FILES, open_limit // 8))


class SharedFiles:
    """Files that all threads read, at offsets; open until all are closed."""

    def __init__(self) -> None:
        self.files: dict[Path, File] = {}
        self.lock = threading.Lock()
        self.room = max(limits.open_files() // 2, 4)

    def get(self, path: Path) -> File | None:
        """The file, open; ``None`` where there is no room for one more.

        ``OSError`` if it cannot be opened.
        """
        file = self.files.get(path)
        if file is not None:
            return file

        with self.lock:
            if path not in self.files:
                if not self._has_room():
                    return None
                self.files[path] = stores.opener_of(path).open(path)
            return self.files[path]

    def close(self) -> None:
        """Closes all of them; no thread reads any more."""
        while self.files:
            self.files.popitem()[1].close()

    def _has_room(self) -> bool:
        """Whether one more file may be open; asks the system for more room if need be."""
        if len(self.files) < self.room:
            return True

        if self.room < MAX_SHARED_FILES:
            allowed = limits.raise_open_files(2 * MAX_SHARED_FILES)
            free = MAX_SHARED_FILES if allowed < 0 else allowed - _OTHER_FILES
            self.room = max(self.room, min(free, MAX_SHARED_FILES))
        return len(self.files) < self.room


@dataclass(frozen=True, eq=False)
class Parsed:
    """The value that a file was parsed to,
    and the bytes of the text that it was parsed from."""

    value: Any
    nbytes: int


class OpenFiles:
    """The files of one command, for one thread."""

    def __init__(self) -> None:
        self.pool = FilePool()
        self.identities: dict[Path, Any] = {}
        self.values: dict[Path, WeakValueDictionary[str, Any]] = {}
        self.recent: OrderedDict[tuple[Path, str], Parsed] = OrderedDict()
        self.recent_bytes = 0
        self.small: dict[tuple[Path, str], Parsed] = {}
        self.examples: OrderedDict[Hashable, object] = OrderedDict()
        self.computed: dict[Hashable, Any] = {}

    def file(self, path: Path) -> File:
        """The file as it is now, open."""
        self._forget_if_replaced(path)
        file = self.pool.get(path)
        self.identities[path] = file.identity
        return file

    def parsed(self, path: Path, form: str, parse: Callable[[File], Parsed]) -> Any:
        """The value that ``parse`` makes of the file; ``form`` says which of its
        parsers that is."""
        self._forget_if_replaced(path)
        values = self.values.setdefault(path, WeakValueDictionary())
        value = values.get(form)
        if value is None:
            result = parse(self.file(path))
            value = values[form] = result.value
            self._keep((path, form), result)

        return value

    def release(self, folder: Path) -> None:
        """Closes the files below a folder."""
        for path in [path for path in self.pool.files if folder in path.parents]:
            self.pool.drop(path)

    def close(self) -> None:
        """Closes all files, and forgets what they hold."""
        self.pool.close()
        self.values.clear()
        self.recent.clear()
        self.small.clear()
        self.examples.clear()
        self.computed.clear()

    def keep_example(self, key: Hashable, example: object) -> None:
        """Keeps an example, in the place of the one that was not asked for longest."""
        self.examples[key] = example
        while len(self.examples) > MAX_EXAMPLES:
            self.examples.popitem(last=False)

    def _keep(self, key: tuple[Path, str], result: Parsed) -> None:
        """Keeps a value in memory, in the place of those that were parsed longest ago.

        A number that a file says takes nobody's place: it is asked for more often.
        """
        if result.nbytes <= MAX_SMALL_BYTES and len(self.small) < MAX_SMALL_VALUES:
            self.small[key] = result
            return

        self.recent[key] = result
        self.recent_bytes += result.nbytes
        while self.recent_bytes > MAX_KEPT_BYTES:
            self.recent_bytes -= self.recent.popitem(last=False)[1].nbytes

    def _forget_if_replaced(self, path: Path) -> None:
        if path not in self.identities:
            return
        if self.identities[path] == stores.status(path).identity:
            return

        self.pool.drop(path)
        del self.identities[path]
        self.values.pop(path, None)
        for key in [key for key in self.recent if key[0] == path]:
            self.recent_bytes -= self.recent.pop(key).nbytes
        for key in [key for key in self.small if key[0] == path]:
            del self.small[key]


class _Current(threading.local):
    """The block that a thread is in."""

    files: OpenFiles | None = None


_current = _Current()


@contextmanager
def once() -> Iterator[None]:
    """Opens and parses each file once in this block; also a decorator.

    A block inside another one shares its files. All are closed at the end.
    """
    if _current.files is not None:
        yield
        return

    _current.files = files = OpenFiles()
    try:
        yield
    finally:
        _current.files = None
        files.close()


@contextmanager
def releasing(folder: Path) -> Iterator[None]:
    """At the end of this block the files below a folder are closed, which is to be
    renamed or deleted: some systems refuse that of open files."""
    try:
        yield
    finally:
        if _current.files is not None:
            _current.files.release(folder)


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """The file, open for this block; ``OSError`` if it cannot be opened."""
    with _files() as get:
        yield get(path)


def parsed(path: Path, form: str, parse: Callable[[File], tuple[_Value, int]]) -> _Value:
    """The value that ``parse`` makes of the file, with the bytes that it parsed.

    ``form`` names the kind of value: a file may be read in several ways.
    """
    if _current.files is not None:
        value = _current.files.parsed(path, form, lambda file: Parsed(*parse(file)))
        return cast(_Value, value)

    with opened(path) as file:
        return parse(file)[0]


def example(key: Hashable) -> object | None:
    """The value under this key in the command that runs; ``None`` outside of one."""
    files = _current.files
    if files is None or key not in files.examples:
        return None

    files.examples.move_to_end(key)  # what is asked for stays
    return files.examples[key]


def keep_example(key: Hashable, value: object) -> None:
    """Keeps a value for as long as the command runs,
    if there is one; the last few are kept."""
    if _current.files is not None:
        _current.files.keep_example(key, value)


def once_a_command(key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """The value that ``compute`` makes, which is kept under ``key`` until the command ends.

    For what is true of a folder as long as a command looks at it, such as which of its
    files have one size.
    """
    files = _current.files
    if files is None:
        return compute()
    if key not in files.computed:
        files.computed[key] = compute()

    return cast(_Value, files.computed[key])


def once_for(inputs: Sequence[object], key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """The value that ``compute`` makes of these very objects.

    Of each ``key`` the last value is kept until the command ends.
    """
    files = _current.files
    if files is None:
        return compute()

    known_inputs, value = files.computed.get(key, ((), None))
    if len(known_inputs) == len(inputs) and all(map(operator.is_, known_inputs, inputs)):
        return cast(_Value, value)

    result = compute()
    files.computed[key] = (tuple(inputs), result)
    return result


def read_extent(extent: Extent) -> bytes:
    """The bytes of a small extent; ``CheckpointError`` if the file is gone or shorter."""
    try:
        with opened(extent.path) as file:
            return read_exactly(file, extent.offset, extent.length)
    except OSError as error:
        raise CheckpointError(f"{extent.path}: {error.strerror}", "incomplete") from error


def read_extents(buffer: memoryview, extents: Extents) -> None:
    """Reads extents one after another; ``CheckpointError`` if a file is gone or shorter."""
    extent: Extent | Strided
    try:
        with _files() as get:
            if isinstance(extents, Strided):
                from converters.storage import strided_reads

                extent = extents
                strided_reads.read(
                    lambda part, run: fill_exactly(get(run.path), run.offset, part),
                    extents,
                    0,
                    buffer,
                )
                return

            for read in extents.reads():
                extent = read.extent
                scatter_exactly(get(extent.path), extent.offset, read.rows(buffer))
    except OSError as error:
        raise CheckpointError(f"{extent.path}: {error.strerror}", "incomplete") from error


@contextmanager
def _files() -> Iterator[Callable[[Path], File]]:
    """What opens files: those of the command or, outside of one, of this block alone."""
    if _current.files is not None:
        yield _current.files.file
        return

    pool = FilePool()
    try:
        yield pool.get
    finally:
        pool.close()
