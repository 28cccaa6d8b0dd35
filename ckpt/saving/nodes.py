"""Which ranks share a folder: one for all nodes, or one on each node's own disk.

Found out by looking, not by flags: rank 0 writes a file with a nonce, every rank looks for it.
DeepSpeed's ``checkpoint.use_node_local_storage`` (which the Trainer's ``save_on_each_node`` sets)
makes each node write what resuming needs there, so it must be what is found.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.runs import lease, leftovers, locks
from ckpt.runs.lease import Lease
from converters import files
from converters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Nodes:
    """This rank's place: ``node`` of ``count`` nodes, its first rank (``leads``) or not.

    ``local``: each node has a folder of its own, else all share one. ``away`` are the ranks that do
    not see rank 0's.
    """

    node: int
    count: int
    leads: bool
    local: bool
    away: tuple[int, ...] = ()

    @property
    def commits(self) -> bool:
        """Whether this rank writes the manifest of its folder."""
        return self.leads if self.local else self.leads and self.node == 0

    @property
    def folder(self) -> int:
        """Which of the folders is this rank's."""
        return self.node if self.local else 0

    @property
    def parts(self) -> int:
        """Folders that a checkpoint lies in."""
        return self.count if self.local else 1


def find(ranks: Ranks, folder: Path, local: bool) -> Nodes:
    """Looks who shares ``folder``; ``local`` is what DeepSpeed's configuration says.

    Every rank calls it. ``CheckpointError`` on every rank where both contradict each other.
    """
    with ExitStack() as stack:
        with ranks.step() as made:
            folder.mkdir(parents=True, exist_ok=True)
            if not ranks.rank:
                made.value = stack.enter_context(_nonce(folder)).name
        path = folder / str(made.heard[0])
        with ranks.step() as seen:
            where = os.environ.get("GROUP_RANK") or socket.gethostname()
            seen.value = [where, files.appears(path)]
        with ranks.step() as told:
            told.value = seen.heard
    names = [str(name) for name, _ in told.heard[0]]
    sees = [bool(there) for _, there in told.heard[0]]
    with ranks.step():
        found = _place(ranks.rank, folder, names, sees, local)
        if found.commits:
            leftovers.clear(folder)
            files.sync_folder(folder)
    return found


@contextmanager
def _nonce(folder: Path) -> Iterator[Path]:
    """A file that only this start makes, locked while it is there and gone after the block."""
    path = folder / f"{leftovers.NONCE}{uuid.uuid4().hex}"
    path.write_bytes(b"")
    try:
        with locks.exclusive(path) or locks.Lock():
            yield path
    finally:
        path.unlink(missing_ok=True)


def hold(ranks: Ranks, nodes: Nodes, folder: Path) -> Lease:
    """The lease of this rank's folder, on the rank that commits; on the others it holds nothing.

    Every rank calls it. ``CheckpointError`` on every rank if another job saves there.
    """
    with ranks.step():
        return lease.acquire(folder, ranks.beat) if nodes.commits else Lease()


def _place(rank: int, folder: Path, names: list[str], sees: list[bool], local: bool) -> Nodes:
    order = list(dict.fromkeys(names))
    leads = names.index(names[rank]) == rank
    away = tuple(other for other, there in enumerate(sees) if not there)
    blind = {names[other] for other in away}
    if any(there and name in blind for name, there in zip(names, sees, strict=True)):
        raise CheckpointError(
            f"{folder}: some ranks of one node see what rank 0 writes there and some do not; give "
            "all ranks the same folder",
            "output",
        )
    if len(order) > 1 and not blind and local:
        raise CheckpointError(
            f"{folder} is shared by all {len(order)} nodes, but use_node_local_storage "
            "(save_on_each_node) is set; unset it, or name a folder on each node's own disk",
            "output",
        )
    if blind and (not local or len(blind) != len(order) - 1):
        which = ", ".join(str(order.index(name)) for name in order if name in blind)
        raise CheckpointError(
            f"{folder} is not shared: node {which} of {len(order)} does not see what rank 0 "
            'writes there; name a shared folder, or set "checkpoint": {"use_node_local_storage": '
            "true} in the DeepSpeed configuration",
            "output",
        )
    return Nodes(order.index(names[rank]), len(order), leads, bool(blind), away)


def local_storage(engine: Any) -> bool:
    """Whether DeepSpeed's configuration says that nodes have folders of their own."""
    call = getattr(engine, "use_node_local_storage", None)
    return bool(call()) if callable(call) else False
