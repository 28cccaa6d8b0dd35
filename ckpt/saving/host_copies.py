"""Host memory that copies of a state are kept in while they are written,
at most a stated budget.

Kept from save to save: fresh memory costs a page fault for every page, several times
the copying.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from typing import Any

import torch

ALIGNED = 4096  # bytes


class HostCopies:
    """Copies of at most ``budget`` bytes in all; ``clear`` forgets them,
    and keeps the memory."""

    def __init__(self, budget: int):
        self.budget = budget
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.pinned = False
        self.used = 0

    def reserve(self, nbytes: int, pinned: bool) -> int:
        """Makes room for ``nbytes`` or as many as the budget has;
        returns how many that are."""
        self.clear()
        granted_bytes = min(nbytes, self.budget)
        if self.buffer.numel() < granted_bytes:
            if self.pinned:
                _cuda_runtime().cudaHostUnregister(self.buffer.data_ptr())
            self.buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self.pinned = pinned and torch.cuda.is_available()
            self.buffer = _map_memory(granted_bytes, pinned)

        return granted_bytes

    def clear(self) -> None:
        """Forgets the copies, and keeps their memory for the next ones."""
        self.used = 0

    def copy(self, values: torch.Tensor) -> torch.Tensor | None:
        """The bytes of a vector, copied, or ``None`` if there is no room for them.

        Of a device they are on their way until ``arrived``.
        """
        source = values.detach().reshape(-1).view(torch.uint8)
        start, end = self.used, self.used + source.numel()
        if end > self.buffer.numel():
            return None
        self.used = -(-end // ALIGNED) * ALIGNED
        target = self.buffer[start:end]
        target.copy_(source, non_blocking=True)
        return target

    def copy_vector(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a vector for which there is room."""
        copied_bytes = self.copy(values)
        if copied_bytes is None:
            raise ValueError(f"no room for {values.nbytes} bytes")
        return copied_bytes.view(values.dtype)

    def synchronize(self, devices: Iterable[torch.device]) -> None:
        """Waits until all copies from these devices are here."""
        for device in devices:
            if device.type != "cpu":
                getattr(torch, device.type).synchronize(device)


def rounded(nbytes: int) -> int:
    """The bytes that a copy of ``nbytes`` takes."""
    return -(-nbytes // ALIGNED) * ALIGNED


def _map_memory(nbytes: int, pinned: bool) -> torch.Tensor:
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)

    mapping = mmap.mmap(-1, nbytes)
    if sys.platform != "win32" and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the page faults
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    if pinned and torch.cuda.is_available():
        # not torch's pinned memory: that is rounded up to a power of two, and kept when
        # freed
        _cuda_runtime().cudaHostRegister(buffer.data_ptr(), nbytes, 0)

    return buffer


def _cuda_runtime() -> Any:
    runtime: Any = torch.cuda
    return runtime.cudart()
