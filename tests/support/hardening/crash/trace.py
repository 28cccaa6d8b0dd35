"""What an operation did to a folder, in the terms of a filesystem: inodes, names and bytes.

The library of ``tests/support/faults`` writes the trace of the real processes (``shim.c`` has its
form). It is preferred to recording in Python under ``converters/storage/local.py``, because it sees
the saver, the threads, shutil, torch and both ranks alike, with what really reached the kernel.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0  # the number of the folder itself


@dataclass(frozen=True, slots=True)
class Inode:
    """A file or folder by number; numbers are never used again, unlike those of the system.

    ``link`` is where a symbolic link leads to.
    """

    number: int
    folder: bool
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder, by the folder's inode number."""

    folder: int
    name: str


@dataclass(frozen=True, slots=True)
class Event:
    """One change. ``kind`` says which fields count:

    write     ``data`` at ``offset`` of ``inode``    truncate, extend   ``inode``: size ``offset``
    sync      ``inode``                              put, drop          ``entry`` names ``inode``
    rename    ``other`` to ``entry``, of ``inode``   exchange           the same, with ``second``
    """

    kind: str
    inode: int
    entry: Entry | None = None
    other: Entry | None = None
    second: int = -1
    offset: int = 0
    data: bytes = b""
    said: str = ""


@dataclass(slots=True)
class Before:
    """The folder when recording began: inodes, bytes, names, and the system's inode numbers."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    system: dict[int, int] = field(default_factory=dict)


def look(root: Path, known: dict[int, bytes] | None = None) -> Before:
    """What is in a folder; all of it counts as on disk.

    ``known`` are the bytes of files with several names by inode; what is read is added.
    """
    found, known = Before(), {} if known is None else known

    def add(path: Path) -> int:
        held = path.lstat()
        if (linked := found.system.get(held.st_ino)) is not None:
            return linked
        number = found.system[held.st_ino] = len(found.inodes)
        link = os.readlink(path) if path.is_symlink() else None
        found.inodes[number] = Inode(number, stat.S_ISDIR(held.st_mode), link)
        if stat.S_ISDIR(held.st_mode):
            names = found.names[number] = {}
            for entry in sorted(path.iterdir()):
                names[entry.name] = add(entry)
        elif link is None:
            data = known[held.st_ino] if held.st_ino in known else path.read_bytes()
            if held.st_nlink > 1:
                known[held.st_ino] = data
            found.files[number] = data
        return number

    add(root)
    return found


def read(path: Path, root: Path, before: Before) -> tuple[list[Event], dict[int, Inode]]:
    """The events of a trace, and all inodes; ``ValueError`` for what it cannot mean."""
    inodes, system = dict(before.inodes), dict(before.system)
    names = {number: dict(held) for number, held in before.names.items()}
    events: list[Event] = []

    def place(text: bytes) -> Entry:
        parts = Path(os.fsdecode(text)).relative_to(root.resolve()).parts
        folder = ROOT
        for part in parts[:-1]:
            folder = names[folder][part]
        return Entry(folder, parts[-1])

    def new(number: int, folder: bool, link: str | None = None) -> int:
        made = Inode(len(inodes), folder, link)
        inodes[made.number] = made
        system[number] = made.number
        if folder:
            names[made.number] = {}
        return made.number

    with open(path, "rb") as file:
        while line := file.readline():
            call, *numbers = line.decode().split()
            inode, value, *lengths = map(int, numbers)
            first, second, data = (file.read(length) for length in lengths)
            said = os.fsdecode(first)
            if call == "write":
                events.append(Event("write", system[inode], offset=value, data=data))
            elif call in ("truncate", "extend"):
                events.append(Event(call, system[inode], offset=value, said=said))
            elif call == "sync":
                events.append(Event("sync", system[inode]))
            elif call in ("create", "mkdir", "symlink"):
                to = os.readlink(said) if call == "symlink" else None
                number, entry = new(inode, call == "mkdir", to), place(first)
                names[entry.folder][entry.name] = number
                events.append(Event("put", number, entry, said=said))
            elif call == "link":
                entry, number = place(first), system[inode]
                names[entry.folder][entry.name] = number
                events.append(Event("put", number, entry, said=said))
            elif call in ("unlink", "rmdir"):
                entry = place(first)
                number = names[entry.folder].pop(entry.name)
                events.append(Event("drop", number, entry, said=said))
            elif call == "rename":
                entry, other = place(first), place(second)
                number = names[other.folder].pop(other.name)
                replaced = names[entry.folder].get(entry.name, -1)
                names[entry.folder][entry.name] = number
                if value & 2:  # RENAME_EXCHANGE
                    names[other.folder][other.name] = replaced
                    events.append(Event("exchange", number, entry, other, replaced, said=said))
                else:
                    events.append(Event("rename", number, entry, other, said=said))
            elif call != "chmod":
                raise ValueError(f"{call} of {said} is not modelled")
    return events, inodes
