"""What may be on disk when the power fails after some of the events of a trace.

An event is durable when its file, or the folder whose entry it changes, was synced after it. Of the
others each may be lost by itself, with two limits that every filesystem keeps: a rename is done or
not done, and the changes of one inode's names are kept in their order. Of writes that were not
synced any may be lost, cut at a sector (512 bytes) or a page (4096), or be there as zeros.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from typing import Literal

from hardening.crash.trace import ROOT, Before, Event, Inode

Fate = Literal["kept", "lost", "sector", "page", "zeros"]
FATES: tuple[Fate, ...] = ("kept", "lost", "sector", "page", "zeros")
UNITS = {"sector": 512, "page": 4096}
SHORT = 5  # changes of names up to which every combination is tried
Fates = Mapping[int, Fate]  # by the number of the event; those not in it are kept
Tree = dict[str, bytes | str | None]  # by path: bytes of a file, None for a folder, a link's text


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder before, and the events of an operation on it."""

    before: Before
    events: Sequence[Event]
    inodes: Mapping[int, Inode]

    def pending(self, prefix: int) -> list[int]:
        """The numbers of the first ``prefix`` events that are not durable after them."""
        synced: dict[int, int] = {}
        for number, event in enumerate(self.events[:prefix]):
            if event.kind == "sync":
                synced[event.inode] = number
        found = []
        for number, event in enumerate(self.events[:prefix]):
            if event.kind == "sync":
                continue
            places = [e.folder for e in (event.entry, event.other) if e] or [event.inode]
            if any(synced.get(place, -1) < number for place in places):
                found.append(number)
        return found

    def tree(self, prefix: int, fates: Fates) -> Tree:
        """The folder, after ``prefix`` events of which some met such a fate."""
        files: dict[int, bytes | bytearray] = dict(self.before.files)
        names = {number: dict(held) for number, held in self.before.names.items()}
        for number, event in enumerate(self.events[:prefix]):
            fate = fates.get(number, "kept")
            if event.kind in ("write", "truncate", "extend"):
                held = files.get(event.inode, b"")
                if isinstance(held, bytes):
                    held = files[event.inode] = bytearray(held)
                _change(held, event, fate)
            elif event.entry is not None and fate == "kept":
                _name(names, event)
        return dict(self._walk(names, files, ROOT, ""))

    def _walk(
        self,
        names: Mapping[int, dict[str, int]],
        files: Mapping[int, bytes | bytearray],
        at: int,
        where: str,
    ) -> Iterator[tuple[str, bytes | str | None]]:
        for name, number in sorted(names.get(at, {}).items()):
            inode, path = self.inodes[number], f"{where}{name}"
            if inode.folder:
                yield path, None
                yield from self._walk(names, files, number, f"{path}/")
            else:
                yield path, bytes(files.get(number, b"")) if inode.link is None else inode.link

    def losses(self, prefix: int, chance: random.Random, most: int) -> Iterator[Fates]:
        """Fates of what is pending after ``prefix`` events: nothing lost, all lost, all of one
        fate, one by one, names in every combination or, where these are many, ``most`` drawn.

        The same may come twice.
        """
        pending = self.pending(prefix)
        data = [n for n in pending if self.events[n].entry is None]
        moves = [n for n in pending if self.events[n].entry is not None]
        yield {}
        yield dict.fromkeys(pending, "lost")
        every: list[Fates] = [dict.fromkeys(data, fate) for fate in FATES]
        yield from every
        yield from ({n: fate} for n in data for fate in FATES[1:])
        yield from ({n: "lost" for n in data if n != kept} for kept in data)
        lost = [self._closed(moves, {n}) for n in moves]
        yield from (dict.fromkeys(held, "lost") for held in lost)
        yield from (dict.fromkeys(moves[at:], "lost") for at in range(len(moves)))
        chosen = [{n for n, gone in zip(moves, bits, strict=True) if gone} for bits in _all(moves)]
        if len(moves) > SHORT:
            chosen = [{n for n in moves if chance.random() < 0.5} for _ in range(most)]
        for gone in chosen:
            names: Fates = dict.fromkeys(self._closed(moves, gone), "lost")
            yield from ({**fates, **names} for fates in every)
        for _ in range(most):
            share = chance.random()
            gone = self._closed(moves, {n for n in moves if chance.random() < share})
            yield {n: chance.choice(FATES) for n in data} | dict.fromkeys(gone, "lost")

    def _closed(self, moves: Sequence[int], gone: set[int]) -> set[int]:
        """With them, what follows them on the same inodes."""
        found, inodes = set(gone), set[int]()
        for number in moves:
            event = self.events[number]
            touched = {event.inode, event.second} - {-1}
            if number in found or touched & inodes:
                found.add(number)
                inodes |= touched
        return found


def _all(moves: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product((0, 1), repeat=len(moves)) if len(moves) <= SHORT else iter(())


def _change(held: bytearray, event: Event, fate: Fate) -> None:
    """What an event does to a file's bytes."""
    data, at, size = event.data, event.offset, len(held)
    if event.kind == "extend" or (event.kind == "truncate" and fate == "kept"):
        wanted = at if event.kind == "truncate" else max(at, size)
        if fate == "kept":
            held[wanted:] = bytes(max(0, wanted - size))
        return
    if fate == "zeros":
        data = bytes(len(data))
    elif fate in UNITS:
        unit = UNITS[fate]
        data = data[: max(0, (at + len(data) // 2) // unit * unit - at)]
    if fate != "lost" and data:
        held.extend(bytes(max(0, at - size)))
        held[at : at + len(data)] = data


def _name(names: dict[int, dict[str, int]], event: Event) -> None:
    """What an event does to names, given that others before it may be lost."""
    entry, other = event.entry, event.other
    assert entry is not None
    here = names.setdefault(entry.folder, {})
    if event.kind == "drop":
        if here.get(entry.name) == event.inode:
            del here[entry.name]
        return
    if other is not None:
        there = names.setdefault(other.folder, {})
        if there.get(other.name) == event.inode:
            del there[other.name]
        if event.kind == "exchange":
            there[other.name] = event.second
    here[entry.name] = event.inode


def digest(tree: Tree) -> bytes:
    """Equal for trees of the same names and bytes, and for no others."""
    found = blake2b(digest_size=16)
    for path, held in tree.items():
        kind, data = ("f", held) if isinstance(held, bytes) else ("l", (held or "").encode())
        found.update(f"{kind} {held is None} {len(path)} {path} {len(data)} ".encode())
        found.update(data)
    return found.digest()
