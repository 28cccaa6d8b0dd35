"""An operation done once by real processes, as a ``Disk``: what it changed, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from faults.forks import Forks

from hardening.crash.disk import Disk, Tree
from hardening.crash.judging import difference
from hardening.crash.trace import ROOT, Before, look, read
from hardening.scenes import OUTPUT, Scene, called

Again = Callable[[], str]  # does the operation once more; what it said if it failed, else ""


@dataclass(frozen=True, slots=True)
class Recording:
    """An operation on the folder ``root``; ``old`` and ``new`` are what is there before and after.

    ``output`` names the folder that is made, where that is all; else ``root`` is a run, or with
    ``hint`` something that may be in any state: only ``again`` has to do it.
    """

    name: str
    root: Path
    disk: Disk
    old: Tree
    new: Tree
    output: str | None
    again: Again
    hint: bool = False

    def without_syncs(self, name: str) -> Recording:
        """As if what was ever called so (``.``: the folder itself) had not been synced."""
        called: dict[int, set[str]] = {ROOT: {"."}}
        for held in self.disk.before.names.values():
            for entry, inode in held.items():
                called.setdefault(inode, set()).add(entry)
        for event in self.disk.events:
            if event.entry is not None:
                called.setdefault(event.inode, set()).add(event.entry.name)
        kept = [
            event
            for event in self.disk.events
            if event.kind != "sync" or name not in called.get(event.inode, ())
        ]
        return replace(self, disk=replace(self.disk, events=kept))


def recorded(
    name: str, root: Path, before: Before, trace: Path, output: str | None, again: Again
) -> Recording:
    """The recording of a trace; ``RuntimeError`` if the model does not end with what is there."""
    events, inodes = read(trace, root, before)
    disk = Disk(before, events, inodes)
    old, new = disk.tree(0, {}), disk.tree(len(events), {})
    there = Disk(look(root), [], look(root).inodes).tree(0, {})
    if new != there:
        raise RuntimeError(
            f"{name}: the trace does not give what is there: {difference(new, there)}"
        )
    return Recording(name, root, disk, old, new, output, again)


def of_command(scene: Scene, base: Path, forks: Forks) -> Recording:
    """Records a command in a folder that is made here."""
    base.mkdir(parents=True)
    scene.build(base)
    root, trace = base / "live", base / "trace"
    before = look(root)
    args = scene.args(base)
    ended = forks.run(args, root, trace=trace)
    if ended.status:
        raise RuntimeError(f"{scene.name} failed: {ended.said}")

    def again() -> str:
        code, said = called(*args)
        return said.strip() if code else ""

    output = OUTPUT if scene.output else None
    return recorded(scene.name, root, before, trace, output, again)
