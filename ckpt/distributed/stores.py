"""The store that the ranks speak through:
that of the process group, or one that rank 0 holds.

torchrun and ``accelerate launch`` keep the group's store in their own process
(``TORCHELASTIC_USE_AGENT_STORE``; torch 2.13
``distributed/rendezvous.py: _create_c10d_store``). It is gone when a signal ends them,
though the ranks live on and could still save. So a training that wants to save when it
is asked to stop moves to a store in rank 0 (``rank_0_store``). A process that trains
alone has no group, and a store of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ckpt.distributed import launchers
from converters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Replacement:
    """A store in the place of ``original``, the one of a process group."""

    original: Any
    store: Any


@dataclass(frozen=True, slots=True)
class Peers:
    """This process among several, and a store that they speak through, without a process
    group."""

    rank: int
    world: int
    store: Any


_replacement: Replacement | None = None
_store_of_one: Any = None  # of a process that trains alone, made when it is asked for


def current() -> Any:
    """The store to use now; the same one on all ranks."""
    global _store_of_one

    launchers.detect()  # while it lives
    if not dist.is_initialized():
        if _store_of_one is None:
            _store_of_one = dist.HashStore()  # type: ignore[attr-defined]
        return _store_of_one

    original = _get_default_store()
    if _replacement is not None and _replacement.original is original:
        return _replacement.store
    return original


def replace(original: Any, store: Any) -> None:
    """Has ``store`` used in the place of ``original``, that of a process group."""
    global _replacement
    _replacement = Replacement(original, store)


def connected(
    address: str,
    port: int,
    rank: int,
    world: int,
    *,
    is_master: bool,
    prefix: str,
    timeout: float,
) -> Peers:
    """The peers that meet in a store at ``address``, which one of them or their launcher
    holds.

    ``CheckpointError`` where it is not reached within ``timeout`` seconds.
    """
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". Exception raised")[0][:200]
        raise CheckpointError(
            f"rank {rank} of {world} cannot meet the others at {address}:{port} ({reason}); "
            "MASTER_ADDR and MASTER_PORT say where rank 0 is",
            "output",
        ) from error

    return Peers(rank, world, PrefixStore(prefix, store))


def lost(error: Exception) -> str:
    """Why the store cannot be reached, as one sentence, and what to do about it."""
    first_line = str(error).strip().partition("\n")[0]
    reason = first_line.partition(". Exception raised")[0][:200]
    launcher = launchers.detect()
    if current_is_launchers() and launcher.ended() is not None:
        return (
            f"the ranks can no longer be reached, as {launcher.name} has ended, which "
            f"held the store they speak through; {launcher.remedy()}"
        )

    return f"the ranks can no longer be reached ({reason}); another process of this job has ended"


def current_is_launchers() -> bool:
    """Whether the store lives in the launcher's process."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return agent and dist.is_initialized() and current() is _get_default_store()
