"""The store that ranks speak through,
moved from the launcher's process to that of rank 0."""

from __future__ import annotations

import atexit
import logging
import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ckpt.distributed import stores
from ckpt.distributed.ranks import RankGroup

log = logging.getLogger("ckpt")
CONNECTING = timedelta(seconds=20)  # until another rank counts as out of reach
PARTING = 5.0  # seconds that rank 0 stays for ranks that may still read


def move_to_rank_0(ranks: RankGroup) -> None:
    """Has rank 0 hold the store,
    from the next ``RankGroup`` on, in place of the launcher.

    Every rank calls it. Where some rank cannot reach rank 0, all stay with the
    launcher's, and a warning says so.
    """
    if not dist.is_initialized():
        return  # a process alone holds its own

    original = _get_default_store()
    is_replaced = stores.current() is not original
    if is_replaced or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return

    host = os.environ.get("MASTER_ADDR", "localhost")
    store: Any = None
    with ranks.step() as hosting:
        if not ranks.rank:
            store = _connect(host, 0, True)
            hosting.value = store.port if store else None

    port = hosting.heard[0]
    with ranks.step() as connecting:
        if ranks.rank and port is not None:
            store = _connect(host, port, False)
        connecting.value = store is not None

    with ranks.step() as agreeing:
        agreeing.value = all(connecting.heard)
    if agreeing.heard[0]:
        stores.replace(original, store)
        atexit.register(
            _stay_for_readers,
            PrefixStore("ckpt.parting", store),
            ranks.rank,
            ranks.world,
        )
    elif not ranks.rank:
        log.warning(
            "some rank cannot reach a port of rank 0 on %s: if the launcher is ended "
            "by a signal, the ranks cannot save",
            host,
        )


def _connect(host: str, port: int, is_master: bool) -> Any:
    options: dict[str, Any] = {"is_master": is_master, "wait_for_workers": False}
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, timeout=CONNECTING, **options
        )
    except (dist.DistError, RuntimeError, OSError):
        return None


def _stay_for_readers(store: Any, rank: int, world_size: int) -> None:
    """Has rank 0 end last, as the other ranks may still read what it holds."""
    deadline = time.monotonic() + PARTING
    with suppress(dist.DistError, RuntimeError):
        left_ranks = store.add("left", 1)
        while not rank and left_ranks < world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            left_ranks = store.add("left", 0)
