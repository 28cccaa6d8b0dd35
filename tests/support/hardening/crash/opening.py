"""States of a disk made real, opened as a user would, and the operation done again in them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.runs.upkeep import findings
from hardening.crash import judging
from hardening.crash.disk import Fates, Tree, digest
from hardening.crash.recording import Recording
from hardening.folders import Folder
from hardening.scenes import called


@dataclass(frozen=True, slots=True)
class State:
    """A crash after ``prefix`` events and what it did to those that were not durable."""

    prefix: int
    fates: Fates
    done: bool


@dataclass(slots=True)
class Opened:
    """What was opened of one recording, and what is wrong."""

    events: int = 0
    states: int = 0
    folders: int = 0
    again: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def states(
    recording: Recording, prefixes: Iterable[int], chance: random.Random, most: int
) -> Iterator[State]:
    """These prefixes, each with its losses."""
    events = len(recording.disk.events)
    for prefix in prefixes:
        seen: set[tuple[tuple[int, str], ...]] = set()
        for fates in recording.disk.losses(prefix, chance, most):
            key = tuple(sorted((n, fate) for n, fate in fates.items() if fate != "kept"))
            if key not in seen:
                seen.add(key)
                yield State(prefix, dict(key), prefix == events)  # type: ignore[arg-type]


class Opener:
    """Opens states of one recording; each folder that comes of them once."""

    def __init__(self, recording: Recording, blobs: Path):
        self.recording, self.folder = recording, Folder(recording.root, blobs)
        self.seen: set[tuple[bytes, bool]] = set()
        self.shapes: dict[tuple[tuple[str, str], ...], State] = {}
        self.final = {digest({"": held}) for held in recording.new.values()}
        self.verdicts = judging.Folders({})
        self.found = Opened(events=len(recording.disk.events))

    def open(self, state: State) -> None:
        """Makes the folder, judges it, and notes it if the operation is to be done again in it."""
        self.found.states += 1
        tree = self.recording.disk.tree(state.prefix, state.fates)
        key = digest(tree), state.done
        if key in self.seen or (key[0], True) in self.seen:
            return
        self.seen.add(key)
        self.found.folders += 1
        shape = tuple(sorted((path, self.shape(held)) for path, held in tree.items()))
        self.shapes.setdefault(shape, state)
        if self.recording.output is None:
            self.folder.make(tree)
        self.tell(state, self.judge(tree, state.done))

    def finish(self, end: float, chance: random.Random, most: int | None = None) -> None:
        """Does the operation again in the folders that were opened, until ``end``, ``most`` times.

        Of those with the same names in them, and the same files whole, cut or empty, only in one:
        what else is in a file that is not whole makes no difference to who finds it.
        """
        todo = list(self.shapes.values())
        chance.shuffle(todo)
        for state in todo[:most]:
            if time.monotonic() > end:
                break
            tree = self.recording.disk.tree(state.prefix, state.fates)
            self.folder.make(tree)
            self.found.again += 1
            self.tell(state, self.redone(tree))
            self.folder.look()

    def tell(self, state: State, wrong: Iterable[str]) -> None:
        """Notes what is wrong."""
        for line in list(wrong)[:3]:
            self.found.findings.append(f"{self.recording.name}: {line} ({self.describe(state)})")

    def shape(self, held: bytes | str | None) -> str:
        """What can be said of a file without reading it."""
        if not isinstance(held, bytes):
            return "folder or link"
        if self.recording.hint:  # who finds it reads it
            return digest({"": held}).hex()
        whole = digest({"": held}) in self.final
        return "whole" if whole else "other" if held.strip(b"\0") else f"zeros {bool(held)}"

    def judge(self, tree: Tree, done: bool) -> Iterator[str]:
        """What is wrong with the folder as it lies there."""
        it = self.recording
        if it.hint:
            return
        try:
            if it.output is not None:
                yield from judging.of_output(tree, it.output, it.old, it.new, done)
            else:
                yield from judging.of_run(it.root, tree, it.old, it.new, done, self.verdicts)
        except Exception as error:
            yield f"opening it: {type(error).__name__}: {error}"
        seen = judging.visible(tree)
        old = judging.same(seen, judging.visible(it.old))
        new = judging.same(seen, judging.visible(it.new))
        self.found.ends["new" if new else "old" if old else "between"] += 1

    def redone(self, tree: Tree) -> Iterator[str]:
        """What is wrong after the operation was done again; leftovers are for ``ckpt doctor``."""
        it = self.recording
        before = judging.visible(tree)
        try:
            said = it.again()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if said and (it.hint or not judging.same(before, judging.visible(it.new))):
            yield f"done again: {said}"
            return
        if it.hint:
            return
        after = self.folder.look()
        if not judging.same(after, it.new):
            code, told = called("doctor", it.root, "--fix")
            after = dict(self.folder.look())
            if it.output is not None:
                after.pop("latest", None)  # the folder is no run; doctor takes it for one
            elif code:
                yield f"doctor: {told.strip()}"
        if not judging.same(after, it.new):
            yield f"done again, it differs: {judging.difference(after, it.new)}"

    def describe(self, state: State) -> str:
        """Where the crash was, for a reader who looks for the reason."""
        events = self.recording.disk.events
        words = [f"after event {state.prefix}"]
        if state.prefix:
            last = events[state.prefix - 1]
            words.append(f"{last.kind} {self._short(last.said)}".strip())
        lost = [(events[n], fate) for n, fate in sorted(state.fates.items())]
        words += [f"{fate}: {e.kind} {self._short(e.said)}".strip() for e, fate in lost[:6]]
        return "; ".join(words + ([f"and {len(lost) - 6} more"] if len(lost) > 6 else []))

    def _short(self, said: str) -> str:
        with suppress(ValueError):
            return str(Path(said).relative_to(self.recording.root))
        return said


@contextmanager
def in_haste() -> Iterator[None]:
    """Nothing is synced, and what was written just now counts as old: all here is replayed."""
    syncs, quiet = (os.fsync, os.fdatasync), findings.QUIET
    os.fsync = os.fdatasync = lambda _: None
    findings.QUIET = 0.0
    try:
        yield
    finally:
        (os.fsync, os.fdatasync), findings.QUIET = syncs, quiet
