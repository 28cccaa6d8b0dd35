"""The work of one rank in one save, at once or later,
from the states or from copies of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt.distributed.chunks import Chunk
from ckpt.live import shards
from ckpt.runs.manifest import FileRecord
from ckpt.saving.host_copies import HostCopies, rounded
from ckpt.saving.model_weights import WeightsWriter
from ckpt.state.state_file import StateFile


class RankWork:
    """States taken down, and this rank's part of the weights.

    ``files`` are those written so far, by posix path relative to ``folder``; ``report``
    is what was written of the weights, on disk but not under its final name; ``notes``
    are what rank 0 hears of the states.
    """

    def __init__(
        self,
        folder: Path,
        states: Sequence[tuple[Path, StateFile]],
        weights: WeightsWriter | None,
    ):
        self.folder, self.states, self.weights = folder, [*states], weights
        self.chunks: Iterable[Chunk] = weights.chunks() if weights else ()
        self.files: dict[str, FileRecord] = {}
        self.report: shards.WrittenRuns | None = None
        self.notes: Any = None
        self.heartbeat: Callable[[], object] = lambda: None
        # set when all that is not copied is written: the trainer may change its state
        self.state_released = threading.Event()
        self.is_written = False  # everything is on disk
        # bytes of the files, from the first on, that are not copied
        self.uncopied_bytes = 0

    @property
    def note(self) -> Any:
        """The words that rank 0 hears: of the weights or, with ``notes``, of states and weights."""
        return self.report if self.notes is None else [self.notes, self.report]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's state files."""
        return sum(state.size(path) for path, state in self.states)

    def copy(self, memory: HostCopies) -> None:
        """Copies what has to be written, the last first,
        as far as the memory's budget goes.

        The rest is what ``write`` begins with; ``state_released`` is set when it is
        behind that. Weights that do not fit are written here.
        """
        # No other list of them: a storage that is copied and replaced can be freed at
        # once.
        storages = (storage for _, state in self.states for storage in state.storages)
        tensors = [_bytes(storage) for storage in storages]
        devices = {tensor.device for tensor in tensors}
        state_bytes = sum(rounded(tensor.numel()) for tensor in tensors)
        weight_bytes = self.weights.part() if self.weights else 0
        is_on_device = any(device.type != "cpu" for device in devices)
        reserved_bytes = memory.reserve(state_bytes + weight_bytes, is_on_device)

        if self.weights and weight_bytes > reserved_bytes:
            self.report = self.weights.write(self.folder, self.chunks)
        elif self.weights:
            self.chunks = [
                (name, start, memory.copy_vector(values)) for name, start, values in self.chunks
            ]

        for path, state in reversed(self.states):
            for index in range(len(state.storages) - 1, -1, -1):
                copied_bytes = memory.copy(tensors.pop())
                if copied_bytes is None:
                    earlier_states = self.states[: self.states.index((path, state))]
                    self.uncopied_bytes = sum(
                        earlier_state.size(earlier_path)
                        for earlier_path, earlier_state in earlier_states
                    )
                    self.uncopied_bytes += state.end_of_storage(path, index)
                    memory.synchronize(devices)
                    return

                state.replace(index, copied_bytes.numpy().data)

        memory.synchronize(devices)
        self.state_released.set()

    def write(self) -> None:
        """Writes everything,
        on disk when it returns; ``heartbeat`` is called now and then."""
        try:
            for path, state in self.states:
                name = path.relative_to(self.folder).as_posix()
                self.files[name] = state.write(path, self._count_written)

            self.state_released.set()
            if self.weights and self.report is None:
                self.report = self.weights.write(self.folder, self._beating_chunks())
            self.is_written = True
        finally:
            self.state_released.set()

    def _count_written(self, count: int) -> None:
        self.uncopied_bytes -= count
        if self.uncopied_bytes <= 0:
            self.state_released.set()
        self.heartbeat()

    def _beating_chunks(self) -> Iterable[Chunk]:
        for chunk in self.chunks:
            self.heartbeat()
            yield chunk


def _bytes(storage: torch.UntypedStorage | torch.Tensor | memoryview) -> torch.Tensor:
    if isinstance(storage, torch.Tensor):
        return storage
    if isinstance(storage, memoryview):
        return torch.frombuffer(storage, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
