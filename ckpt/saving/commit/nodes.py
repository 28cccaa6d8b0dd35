"""Which ranks share a folder: one for all nodes, or one on each node's own disk.

Found out by looking, not by flags: rank 0 writes a file with a nonce, every rank looks
for it. DeepSpeed's ``checkpoint.use_node_local_storage`` (which the Trainer's
``save_on_each_node`` sets) makes each node write what resuming needs there, so it must
be what is found.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.distributed.ranks import RankGroup
from ckpt.folders import leftovers, locks
from ckpt.runs.lease import lease
from ckpt.runs.lease.lease import Lease
from ckpt.saving.commit.filesystem_trials import tried
from converters.errors import CheckpointError
from converters.storage import local as files


@dataclass(frozen=True, slots=True)
class Nodes:
    """This rank's place: ``node`` of ``count`` nodes, its first rank (``leads``) or not.

    ``local``: each node has a folder of its own, else all share one. ``away`` are the
    ranks that do not see rank 0's.
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


def find(ranks: RankGroup, folder: Path, local: bool) -> Nodes:
    """Looks who shares ``folder``; ``local`` is what DeepSpeed's configuration says.

    Every rank calls it. ``CheckpointError`` on every rank where both contradict each
    other.
    """
    with ExitStack() as stack:
        with ranks.step() as nonce, tried(folder, "making a file"):
            folder.mkdir(parents=True, exist_ok=True)
            if not ranks.rank:
                nonce.value = stack.enter_context(_nonce(folder)).name

        path = folder / str(nonce.heard[0])
        with ranks.step() as sightings:
            node_name = os.environ.get("GROUP_RANK") or socket.gethostname()
            sightings.value = [node_name, files.wait_for_file(path)]

        with ranks.step() as answers:
            answers.value = sightings.heard

    names = [str(name) for name, _ in answers.heard[0]]
    sees = [bool(is_seen) for _, is_seen in answers.heard[0]]

    with ranks.step():
        nodes = _find_place(ranks.rank, folder, names, sees, local)
        if nodes.commits:
            leftovers.clear(folder)
            files.sync_folder(folder)

    return nodes


@contextmanager
def _nonce(folder: Path) -> Iterator[Path]:
    """A file that only this start makes,
    locked while it is there and gone after the block."""
    path = folder / f"{leftovers.NONCE}{uuid.uuid4().hex}"
    path.write_bytes(b"")
    try:
        with locks.exclusive(path) or locks.Lock():
            yield path
    finally:
        path.unlink(missing_ok=True)


def hold(ranks: RankGroup, nodes: Nodes, folder: Path) -> Lease:
    """The lease of this rank's folder,
    on the rank that commits; on the others it holds nothing.

    Every rank calls it. ``CheckpointError`` on every rank if another job saves there.
    """
    with ranks.step():
        return lease.acquire(folder, ranks.heartbeat) if nodes.commits else Lease()


def _find_place(
    rank: int,
    folder: Path,
    names: list[str],
    sees: list[bool],
    local: bool,
) -> Nodes:
    node_names = list(dict.fromkeys(names))
    leads = names.index(names[rank]) == rank
    away = tuple(peer for peer, is_seen in enumerate(sees) if not is_seen)
    blind_nodes = {names[peer] for peer in away}
    seeing_nodes = {name for name, is_seen in zip(names, sees, strict=True) if is_seen}
    if seeing_nodes & blind_nodes:
        raise CheckpointError(
            f"{folder}: some ranks of one node see what rank 0 writes there and some "
            "do not; give all ranks the same folder",
            "output",
        )

    if len(node_names) > 1 and not blind_nodes and local:
        raise CheckpointError(
            f"{folder} is shared by all {len(node_names)} nodes, but "
            "use_node_local_storage (save_on_each_node) is set; unset it, or name a "
            "folder on each node's own disk",
            "output",
        )

    if blind_nodes and (not local or len(blind_nodes) != len(node_names) - 1):
        blind_numbers = ", ".join(
            str(node_names.index(name)) for name in node_names if name in blind_nodes
        )
        raise CheckpointError(
            f"{folder} is not shared: node {blind_numbers} of {len(node_names)} does not "
            "see what rank 0 writes there; name a shared folder, or set "
            '"checkpoint": {"use_node_local_storage": true} in the DeepSpeed configuration',
            "output",
        )

    node = node_names.index(names[rank])
    return Nodes(node, len(node_names), leads, bool(blind_nodes), away)
