"""Which store keeps a name, and what it says of it: the door that readers use.

    STORES    "" -> the local filesystem;  a scheme -> the store of its URLs

A remote store is a module with a ``store.Store``, and one row in ``STORES``: its scheme,
and the store, which connects when it is first asked for something. Everything that reads
a checkpoint asks here, so that a checkpoint may lie in any of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from converters.errors import CheckpointError
from converters.storage.local_store import LOCAL
from converters.storage.store import File, FolderEntry, Name, Opener, Status, Store, StoredFile
from converters.storage.url_path import UrlPath, canonical, download, scheme_of

_COPIED_BYTES = 1 << 20  # at a time

STORES: dict[str, Store] = {"": LOCAL}

# what else a filesystem answers where nothing is, as ``pathlib`` has it
_ABSENT = (errno.EBADF, errno.ELOOP)


def store_of(name: Name) -> Store:
    """The store that keeps a name; ``CheckpointError`` for a URL of an unknown scheme."""
    scheme = scheme_of(name)
    store = STORES.get(scheme)
    if store is None:
        known_schemes = [f"{key}://" for key in sorted(STORES) if key]
        places = " and ".join(("local files", *known_schemes))
        raise CheckpointError(
            f"{os.fspath(name)} is a URL of a kind ({scheme}://) that ckpt does not read: it "
            f"reads {places}; {download(name)}",
            "unsupported",
        )
    return store


def opener_of(name: Name) -> Opener:
    """What opens a name: its store, or what the path of a compressed item brings along."""
    opener: Opener | None = getattr(name, "opener", None)  # of compressed_items.ItemPath alone
    return store_of(name) if opener is None else opener


def source_path(name: Name) -> Path:
    """The path of something to read, of a URL a ``UrlPath``; of "file:///PATH" the path.

    ``CheckpointError`` for a URL of an unknown scheme.
    """
    name = canonical(name)
    store_of(name)
    return UrlPath(name) if scheme_of(name) else Path(name)


def status(path: Name) -> Status:
    """The status of a path; ``OSError`` if nothing is there."""
    return opener_of(path).status(path)


def regular_size(path: Name) -> int:
    """The bytes of a plain file, by one look; ``OSError`` if nothing lies there.

    ``CheckpointError`` for what is not a plain file: a device or a pipe may have no end.
    """
    present = status(path)
    if not present.is_file:
        raise CheckpointError(f"{path} is not a regular file", "refused")
    return present.size


def exists(path: Name) -> bool:
    """Whether anything lies at a path; ``OSError`` where that may not be looked at."""
    return _status(path) is not None


def is_file(path: Name) -> bool:
    """Whether a plain file lies at a path, or a link to one; ``OSError`` as ``exists``."""
    present = _status(path)
    return present is not None and present.is_file


def is_folder(path: Name) -> bool:
    """Whether a folder lies at a path, or a link to one; ``OSError`` as ``exists``."""
    present = _status(path)
    return present is not None and present.is_folder


def _status(path: Name) -> Status | None:
    if not _is_name_of_file(path):
        return None

    try:
        return status(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None


def _is_name_of_file(path: Name) -> bool:
    """Whether a file can have the name: no NUL is in it, and no half of a character."""
    name = os.fspath(path)
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def is_dead_link(path: Path) -> bool:
    """Whether a path is a link that leads nowhere; only a local one can be."""
    return not scheme_of(path) and path.is_symlink() and not path.exists()


def entries(folder: Name) -> Sequence[FolderEntry]:
    """The entries right in a folder, by name; ``OSError`` if it is not a folder."""
    return store_of(folder).entries(folder)


def names(folder: Name) -> list[str]:
    """The names in a folder, sorted; ``OSError`` if it is not a folder."""
    return [entry.name for entry in entries(folder)]


def folders(folder: Name) -> list[str]:
    """The names of the folders in a folder, sorted; ``OSError`` if it is not a folder."""
    return [entry.name for entry in entries(folder) if entry.is_folder]


def files_below(folder: Name) -> Iterator[StoredFile]:
    """The files below a folder, with their sizes, by name."""
    return store_of(folder).list(folder)


@contextmanager
def opened(path: Name) -> Iterator[File]:
    """The file, open for this block alone; ``OSError`` if it cannot be opened."""
    file = opener_of(path).open(path)
    try:
        yield file
    finally:
        file.close()


def head(path: Name, nbytes: int) -> bytes:
    """The first bytes of a file, fewer where it is shorter;
    ``OSError`` if it cannot be read."""
    with opened(path) as file:
        return file.read([(0, nbytes)])[0]


def copy_file(source: Path, target: Path) -> None:
    """Copies a file to a local one, whole or not at all, and synced."""
    with opened(source) as file, LOCAL.open_writer(target) as writer:
        position = 0
        while piece := file.read([(position, _COPIED_BYTES)])[0]:
            writer.write(piece, position)
            position += len(piece)


def is_readable(path: Path) -> bool:
    """Whether a file may be read, as far as can be said without opening it."""
    return bool(scheme_of(path)) or os.access(path, os.R_OK)


def content(path: Name) -> bytes:
    """All bytes of a small file; ``OSError`` if it cannot be read."""
    with opened(path) as file:
        return file.read([(0, file.size)])[0]
