"""A folder that is made to hold a tree again and again, quickly."""

from __future__ import annotations

import os
import shutil
from hashlib import blake2b
from pathlib import Path

from hardening.crash.disk import Disk, Tree
from hardening.crash.trace import look

LINKED = 4096  # bytes from which on a file is a hard link to one that was written before


class Folder:
    """The folder ``root``; ``blobs`` is where its large files lie, by their digests."""

    def __init__(self, root: Path, blobs: Path):
        self.root, self.blobs = root, blobs
        blobs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        self.current: Tree = {}
        self.known: dict[int, bytes] = {}  # of the hard links, by inode

    def make(self, tree: Tree) -> None:
        """Makes the folder hold just this, and touches only what differs from what is there.

        What is large and never written in place is a hard link: what is hidden may be written so.
        """
        there = self.current
        differs = {p for p in there if p not in tree or type(tree[p]) is not type(there[p])}
        for path in sorted(differs, reverse=True):
            if there[path] is None:
                (self.root / path).rmdir()
            else:
                (self.root / path).unlink()
        for path, held in tree.items():
            target = self.root / path
            if path in there and path not in differs:
                if there[path] == held:
                    continue
                target.unlink()
            if held is None:
                target.mkdir()
            elif isinstance(held, str):
                target.symlink_to(held)
            elif len(held) >= LINKED and not path.endswith(".partial") and "/." not in f"/{path}":
                os.link(self._blob(held), target)
            else:
                target.write_bytes(held)
        self.current = tree

    def look(self) -> Tree:
        """What is in the folder now."""
        held = look(self.root, self.known)
        self.current = Disk(held, [], held.inodes).tree(0, {})
        return self.current

    def untouched(self) -> bool:
        """Whether nobody wrote into a file that is linked."""
        held = ((path, path.read_bytes()) for path in self.blobs.iterdir())
        return all(path.name == blake2b(data, digest_size=16).hexdigest() for path, data in held)

    def _blob(self, held: bytes) -> Path:
        path = self.blobs / blake2b(held, digest_size=16).hexdigest()
        if not path.exists():
            path.write_bytes(held)
        return path
