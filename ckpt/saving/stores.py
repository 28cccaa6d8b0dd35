"""The store that the ranks speak through: that of the process group, or one that rank 0 holds.

torchrun and ``accelerate launch`` keep the group's store in their own process
(``TORCHELASTIC_USE_AGENT_STORE``; torch 2.13 ``distributed/rendezvous.py: _create_c10d_store``). It
is gone when a signal ends them, though the ranks live on and could still save. So a training that
wants to save when it is asked to stop moves to a store in rank 0 (``move_to_rank_0``).
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ckpt.saving import launchers

if TYPE_CHECKING:
    from ckpt.ranks import Ranks

log = logging.getLogger("ckpt")
CONNECTING = timedelta(seconds=20)  # until another rank counts as out of reach
PARTING = 5.0  # seconds that rank 0 stays for ranks that may still read


@dataclass(frozen=True, slots=True)
class Replacement:
    """A store in the place of ``original``, the one of a process group."""

    original: Any
    store: Any


_replacement: Replacement | None = None


def current() -> Any:
    """The store to use now; the same one on all ranks."""
    launchers.detect()  # while it lives
    original = _get_default_store()
    if _replacement is not None and _replacement.original is original:
        return _replacement.store
    return original


def move_to_rank_0(ranks: Ranks) -> None:
    """From the next ``Ranks`` on, rank 0 holds the store, where the launcher held it before.

    Every rank calls it. Where some rank cannot reach rank 0, all stay with the launcher's, and a
    warning says so.
    """
    global _replacement
    original = _get_default_store()
    there = _replacement is not None and _replacement.original is original
    if there or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host = os.environ.get("MASTER_ADDR", "localhost")
    store: Any = None
    with ranks.step() as hosting:
        if not ranks.rank:
            store = _opened(host, 0, True)
            hosting.value = store.port if store else None
    port = hosting.heard[0]
    with ranks.step() as connecting:
        if ranks.rank and port is not None:
            store = _opened(host, port, False)
        connecting.value = store is not None
    with ranks.step() as agreeing:
        agreeing.value = all(connecting.heard)
    if agreeing.heard[0]:
        _replacement = Replacement(original, store)
        atexit.register(_part, PrefixStore("ckpt.parting", store), ranks.rank, ranks.world)
    elif not ranks.rank:
        log.warning(
            "some rank cannot reach a port of rank 0 on %s: if the launcher is ended by a signal, "
            "the ranks cannot save",
            host,
        )


def _opened(host: str, port: int, is_master: bool) -> Any:
    try:
        options: dict[str, Any] = {"is_master": is_master, "wait_for_workers": False}
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, timeout=CONNECTING, **options
        )
    except (dist.DistError, RuntimeError, OSError):
        return None


def _part(store: Any, rank: int, world: int) -> None:
    """At the end of the process: rank 0 ends last, as the others may still read what it holds."""
    end = time.monotonic() + PARTING
    with suppress(dist.DistError, RuntimeError):
        left = store.add("left", 1)
        while not rank and left < world and time.monotonic() < end:
            time.sleep(0.02)
            left = store.add("left", 0)


def lost(error: Exception) -> str:
    """Why the store cannot be reached, as one sentence, and what to do about it."""
    why = str(error).strip().partition("\n")[0].partition(". Exception raised")[0][:200]
    launcher = launchers.detect()
    if current_is_launchers() and launcher.ended() is not None:
        return (
            f"the ranks can no longer be reached, as {launcher.name} has ended, which held the "
            f"store they speak through; {launcher.remedy()}"
        )
    return f"the ranks can no longer be reached ({why}); another process of this training has ended"


def current_is_launchers() -> bool:
    """Whether the store lives in the launcher's process."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return agent and dist.is_initialized() and current() is _get_default_store()
