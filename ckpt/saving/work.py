"""What one rank writes in one save, at once or later, from the states or from copies of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ckpt.live import shards
from ckpt.live.wire import Chunk
from ckpt.runs.manifest import File
from ckpt.saving.memory import Memory, rounded
from ckpt.saving.weights import Weights
from ckpt.saving.zips import Captured


class Work:
    """States taken down by ``engine.save_checkpoint``, and this rank's part of the weights.

    ``files`` are those written so far, by posix path relative to ``folder``; ``report`` is what was
    written of the weights, on disk but not under its final name.
    """

    def __init__(self, folder: Path, states: list[tuple[Path, Captured]], weights: Weights | None):
        self.folder, self.states, self.weights = folder, states, weights
        self.chunks: Iterable[Chunk] = weights.chunks() if weights else ()
        self.files: dict[str, File] = {}
        self.report: shards.Report | None = None
        self.beat: Callable[[], object] = lambda: None
        self.passed = threading.Event()  # what the trainer may change again is all that is left
        self.done = False  # everything is on disk
        self.ours = 0  # bytes of the files, from the first on, that are not copied

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's state files."""
        return sum(state.size(path) for path, state in self.states)

    def copy(self, memory: Memory) -> None:
        """Copies what has to be written, the last first, as far as the memory's budget goes.

        The rest is what ``write`` begins with; ``passed`` is set when it is behind that. Weights
        that do not fit are written here.
        """
        tensors = [_bytes(held) for _, state in self.states for held in state.storages]
        devices = {tensor.device for tensor in tensors}
        wanted = sum(rounded(tensor.numel()) for tensor in tensors)
        part = self.weights.part() if self.weights else 0
        room = memory.reserve(wanted + part, any(device.type != "cpu" for device in devices))
        if self.weights and part > room:
            self.report, part = self.weights.write(self.folder, self.chunks), 0
        elif self.weights:
            self.chunks = [(name, at, memory.keep(values)) for name, at, values in self.chunks]
        for path, state in reversed(self.states):
            for index in range(len(state.storages) - 1, -1, -1):
                copied = memory.copy(tensors.pop())
                if copied is None:
                    before = self.states[: self.states.index((path, state))]
                    self.ours = sum(other.size(place) for place, other in before)
                    self.ours += _end(state, path, index)
                    memory.arrived(devices)
                    return
                state.replace(index, copied.numpy().data)
        memory.arrived(devices)
        self.passed.set()

    def write(self) -> None:
        """Writes everything, on disk when it returns; ``beat`` is called now and then."""
        try:
            for path, state in self.states:
                name = path.relative_to(self.folder).as_posix()
                self.files[name] = state.write(path, self._progress)
            self.passed.set()
            if self.weights and self.report is None:
                self.report = self.weights.write(self.folder, self._watched())
            self.done = True
        finally:
            self.passed.set()

    def _progress(self, count: int) -> None:
        self.ours -= count
        if self.ours <= 0:
            self.passed.set()
        self.beat()

    def _watched(self) -> Iterable[Chunk]:
        for chunk in self.chunks:
            self.beat()
            yield chunk


def _bytes(storage: torch.UntypedStorage | memoryview) -> torch.Tensor:
    if isinstance(storage, memoryview):
        return torch.frombuffer(storage, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _end(state: Captured, path: Path, index: int) -> int:
    """Where a storage ends in its file."""
    name = f"/data/{index}".encode()
    return next(record.end for record in state.records(path) if record.name.endswith(name))
