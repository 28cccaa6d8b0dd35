"""What a user finds in a folder after a crash: the old state or the new one, or what is wrong.

Of a run: every committed checkpoint by ``ckpt verify --data``, ``Run.newest``, the pointers, what
DeepSpeed would load by the file latest, and folders that stock tools would take for checkpoints.
Of an output: that it is not there, or is, byte for byte, the old or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.folders import filenames
from ckpt.runs import lineage, manifest, verify
from ckpt.runs.lease import lease_file
from ckpt.runs.run import POINTERS, Run, open_checkpoint
from converters.errors import CheckpointError
from converters.zero import checkpoint
from hardening.crash.disk import Tree, digest

VOLATILE = (
    "created",
    "save",
    "world_size",
    "digest",
)  # what is otherwise when one rank saves the same again


def below(tree: Tree, folder: str) -> Tree:
    """What is in a folder of a tree, by relative path."""
    start = f"{folder}/"
    return {path[len(start) :]: held for path, held in tree.items() if path.startswith(start)}


def visible(tree: Tree) -> Tree:
    """What is not hidden, and in nothing hidden, and no lease."""
    return {
        path: held
        for path, held in tree.items()
        if not path.startswith(lease_file.NAME) and not any(x[:1] == "." for x in path.split("/"))
    }


def same(one: Tree, other: Tree) -> bool:
    """Equal but for when a manifest was made; the order of names does not count."""
    return _plain(one) == _plain(other)


def difference(one: Tree, other: Tree) -> str:
    """The first paths that differ, for a reader."""
    a, b = _plain(one), _plain(other)
    found = sorted(p for p in a.keys() | b.keys() if a.get(p, "-") != b.get(p, "-"))
    return ", ".join(f"{'+' if p not in b else '-' if p not in a else '!'}{p}" for p in found[:5])


def _plain(tree: Tree) -> Mapping[str, object]:
    found: dict[str, object] = dict(tree)
    for path, held in tree.items():
        if path.rpartition("/")[2] == filenames.MANIFEST and isinstance(held, bytes):
            try:
                made = json.loads(held)
            except ValueError:
                continue
            if isinstance(made, dict):
                found[path] = {k: v for k, v in made.items() if k not in VOLATILE}
    return found


@dataclass(frozen=True, slots=True)
class Folders:
    """Verdicts on checkpoints that were looked at before, by what was asked and the digest of what
    is in them."""

    known: dict[tuple[str, bytes], list[str]]

    def problems(self, folder: Path, held: Tree) -> list[str]:
        """What ``ckpt verify --data`` finds wrong with a checkpoint."""
        key = folder.name, digest(held)
        if key not in self.known:
            found = verify.verify(open_checkpoint(folder), data=True)
            self.known[key] = list(found.problems)
        return self.known[key]

    def hindrances(self, root: Path, tree: Tree, name: str) -> list[str]:
        """Why DeepSpeed could not load the checkpoint that a run's file latest names, ``name``."""
        pointer = {"../latest": tree["latest"]}
        key = f"latest {name}", digest(pointer | below(tree, name))
        if key not in self.known:
            try:
                checkpoint.read(root)
                self.known[key] = []
            except CheckpointError as error:
                self.known[key] = [str(error)]
        return self.known[key]


def of_output(tree: Tree, name: str, old: Tree, new: Tree, done: bool) -> Iterator[str]:
    """What is wrong with an output folder; ``done``: the command had ended."""
    fits = (new,) if done else (old, new)
    seen = visible(tree)
    if not any(same(seen, visible(each)) for each in fits):
        yield f"{name} is a third thing: {difference(seen, visible(new))}"


def of_run(
    root: Path, tree: Tree, old: Tree, new: Tree, done: bool, seen: Folders
) -> Iterator[str]:
    """What is wrong with a run; ``done``: the command had ended, so the new state is due."""
    run = Run(root)
    fits = (new,) if done else (old, new)
    names = {
        path.partition("/")[0] for path in visible(tree) if tree[path.partition("/")[0]] is None
    }
    for name in sorted(names):
        yield from _of_checkpoint(root / name, tree, old, new, seen)
    held = [below(tree, name) for name in names]
    moved = set()
    for name, kept in _kept(old, new):
        if kept in held:
            moved.add(name)
        else:
            yield f"{name}, which the operation keeps, is not there"
    for name in sorted(
        {p for p in visible(old).keys() & visible(new) if "/" not in p} - {*POINTERS}
    ):
        if name not in tree and name not in moved:
            yield f"{name} is gone"
    if done:
        tops = {p for p in visible(tree) if "/" not in p and not p.endswith(".partial")}
        if tops != {p for p in visible(new) if "/" not in p}:
            yield f"the command ended, and there is {sorted(tops)}"
    newest = run.newest()
    name = newest.name if newest else None
    if name not in {_newest(each) for each in fits}:
        yield f"the newest is {name}"
    for pointer in POINTERS:
        yield from _of_pointer(run, pointer, tree, old, fits, seen)


def _of_checkpoint(path: Path, tree: Tree, old: Tree, new: Tree, seen: Folders) -> Iterator[str]:
    name, held = path.name, below(tree, path.name)
    manifests = [below(each, name).get(filenames.MANIFEST, b"-") for each in (old, new)]
    if held == below(old, name):
        return
    if held.get(filenames.MANIFEST, b"-") not in manifests:
        yield f"{name}: its manifest is neither the old one nor the new one"
    elif filenames.MANIFEST in held and (_listed(held) or _listed(below(old, name))):
        yield from (f"{name}: {line}" for line in seen.problems(path, held))
    elif name not in old or _listed(below(old, name)):
        yield f"{name} is there and not committed"


def _kept(old: Tree, new: Tree) -> Iterator[tuple[str, Tree]]:
    """The committed checkpoints that are there before and after, under the same name or another."""
    after = [below(new, path) for path, held in visible(new).items() if held is None]
    for path in visible(old):
        name, _, rest = path.partition("/")
        if rest == filenames.MANIFEST and (held := below(old, name)) in after:
            yield name, held


def _listed(held: Tree) -> bool:
    """Whether every file that the manifest lists has its size; if not, there is no checkpoint."""
    listed = json.loads(held.get(filenames.MANIFEST) or b'{"files": {"": {"size": 1}}}')["files"]
    sizes = {path: len(data) for path, data in held.items() if isinstance(data, bytes)}
    return all(sizes.get(path) == file["size"] for path, file in listed.items())


def _newest(tree: Tree) -> str | None:
    """The name of the newest full checkpoint of the line that saved last, by the manifests."""
    found = {}
    for path, held in visible(tree).items():
        if (
            path.count("/") == 1
            and path.endswith(f"/{filenames.MANIFEST}")
            and isinstance(held, bytes)
        ):
            found[path.partition("/")[0]] = manifest.loads(held, Path(path))
    line = lineage.current(found.values())
    full = [
        (m.step, name) for name, m in found.items() if m.tier == "full" and line and line.has(m)
    ]
    return max(full)[1] if full else None


def _of_pointer(
    run: Run, name: str, tree: Tree, old: Tree, fits: tuple[Tree, ...], seen: Folders
) -> Iterator[str]:
    if tree.get(name) not in [each.get(name) for each in fits]:
        yield f"{name} holds {tree.get(name)!r}"
        return
    if name not in tree or not _leads(old, name):
        return
    found = run.pointer(name)
    if found is None or not found.committed:
        yield f"{name} names {tree[name]!r}, which is not committed"
    elif name == "latest" and found.tier == "full":
        for line in seen.hindrances(run.path, tree, found.name):
            yield f"DeepSpeed could not load by latest: {line}"


def _leads(tree: Tree, name: str) -> bool:
    """Whether a pointer of a tree names a committed checkpoint in it, and its tag."""
    text = tree.get(name)
    if not isinstance(text, bytes):
        return False
    where = text.decode()
    return (
        tree.get(where, b"") is None and f"{where.partition('/')[0]}/{filenames.MANIFEST}" in tree
    )
