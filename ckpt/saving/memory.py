"""Host memory that copies of a state are kept in while they are written, at most a stated budget.

Kept from save to save: fresh memory costs a page fault for every page, several times the copying.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.errors import CheckpointError
from converters.plan import parse_size

ALIGNED = 4096  # bytes
SHARE = 0.5  # of the memory that is available, where no budget is given


class Memory:
    """Copies of at most ``budget`` bytes in all; ``clear`` forgets them, and keeps the memory."""

    def __init__(self, budget: int):
        self.budget = budget
        self.held = torch.empty(0, dtype=torch.uint8)
        self.pinned = False
        self.used = 0

    def reserve(self, nbytes: int, pinned: bool) -> int:
        """Makes room for ``nbytes`` or as many as the budget has; returns how many that are."""
        self.clear()
        wanted = min(nbytes, self.budget)
        if self.held.numel() < wanted:
            if self.pinned:
                _cuda().cudaHostUnregister(self.held.data_ptr())
            self.held = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self.pinned = pinned and torch.cuda.is_available()
            self.held = _memory(wanted, pinned)
        return wanted

    def clear(self) -> None:
        """The copies are no longer needed."""
        self.used = 0

    def copy(self, values: torch.Tensor) -> torch.Tensor | None:
        """The bytes of a vector, copied, or ``None`` if there is no room for them.

        Of a device they are on their way until ``arrived``.
        """
        source = values.detach().reshape(-1).view(torch.uint8)
        start, end = self.used, self.used + source.numel()
        if end > self.held.numel():
            return None
        self.used = -(-end // ALIGNED) * ALIGNED
        target = self.held[start:end]
        target.copy_(source, non_blocking=True)
        return target

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a vector for which there is room."""
        copied = self.copy(values)
        if copied is None:
            raise ValueError(f"no room for {values.nbytes} bytes")
        return copied.view(values.dtype)

    def arrived(self, devices: Iterable[torch.device]) -> None:
        """Waits until all copies from these devices are here."""
        for device in devices:
            if device.type != "cpu":
                getattr(torch, device.type).synchronize(device)


def rounded(nbytes: int) -> int:
    """What a copy of ``nbytes`` takes."""
    return -(-nbytes // ALIGNED) * ALIGNED


def _memory(nbytes: int, pinned: bool) -> torch.Tensor:
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    held = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        held.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the page faults
    found = torch.frombuffer(held, dtype=torch.uint8)
    if pinned and torch.cuda.is_available():
        # not torch's pinned memory: that is rounded up to a power of two, and kept when freed
        _cuda().cudaHostRegister(found.data_ptr(), nbytes, 0)
    return found


def _cuda() -> Any:
    runtime: Any = torch.cuda
    return runtime.cudart()


def budget(given: str | int | None) -> int:
    """A budget in bytes; without one, this rank's part of half the memory that is available."""
    if given is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or dist.get_world_size()
        return int(SHARE * available() / here)
    try:
        return parse_size(given) if isinstance(given, str) else max(0, given)
    except ValueError as error:
        raise CheckpointError(f"memory: {error}", "output") from error


def available() -> int:
    """Bytes of memory that programs can still get; 0 if that is not known.

    As Linux estimates it (``/proc/meminfo``), or less where a container is allowed less.
    """
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *allowed()])
    return 0


def allowed(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """What each control group that this process is in leaves it, in bytes; page cache is no use.

    Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    for line in proc.read_text().splitlines() if proc.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            base, names = root / "memory", _V1
        elif not kinds:
            base, names = root, _V2
        else:
            continue
        inside = base / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder == base.parent:
                break
            with suppress(OSError, ValueError):  # above this container's own, or without a limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(item.split() for item in (folder / "memory.stat").open())
                yield max(0, limit - used + int(stat.get(names[2], 0)))


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
