"""DeepSpeed's own seam for how states become files, with a writer of ours in it.

``engine.save_checkpoint`` asks its ``checkpoint_engine`` to save each file (DeepSpeed
``runtime/checkpoint_engine/checkpoint_engine.py``: create, save, load, commit). Ours
either takes the states down, to be written when no rank waits in a barrier any more, or
writes them at once, on disk and digested. Neither raises in the middle: the other ranks
would wait in a barrier and never leave it. What failed is raised by ``require``, when
all are out of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from ckpt.engine.view import EngineView, internals, offloads_optimizer_to_nvme
from ckpt.runs.manifest import FileRecord
from ckpt.state import torch_file

# What the engine does between barriers, without any in them.
_STEPS = ("_save_checkpoint", "_save_moe_checkpoint", "_save_zero_checkpoint")


class CapturingEngine(CheckpointEngine):
    """States as ``engine.save_checkpoint`` hands them over: ``captured``, not written."""

    def __init__(self, original: Any):
        super().__init__()
        self.original = original
        self.captured: list[tuple[Path, torch_file.Captured]] = []
        self.failure: Exception | None = None

    def create(self, info: Any) -> None:
        """Does nothing: there is nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keeps the state; what cannot be pickled is a failure."""
        try:
            self._keep(Path(path), torch_file.capture(state_dict))
        except Exception as error:  # raised by ``require``, when no rank waits for this one
            self.failure = self.failure or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes the folder as DeepSpeed does; a failure is raised later."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def later(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose failure is raised later, by ``require``."""

        def call_and_note(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:  # as above
                self.failure = self.failure or error
                return None

        return call_and_note

    def _keep(self, path: Path, state: torch_file.Captured) -> None:
        self.captured.append((path, state))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Loads a file as the engine's own checkpoint engine does."""
        return self.original.load(path, map_location=map_location)

    def commit(self, info: Any) -> bool:
        """Does nothing: the saver commits, not DeepSpeed."""
        return True

    def require(self) -> None:
        """Raises what failed since the last call."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


Writer = TypeVar("Writer", bound=CapturingEngine)


class WritingEngine(CapturingEngine):
    """States on disk when ``save`` returns,
    under their final names; ``files`` has the digests."""

    def __init__(self, original: Any):
        super().__init__(original)
        self.files: dict[Path, FileRecord] = {}

    def _keep(self, path: Path, state: torch_file.Captured) -> None:
        self.files[path] = state.write(path)


@contextmanager
def installed(engine: EngineView, writer_class: type[Writer]) -> Iterator[Writer]:
    """Puts a writer of ckpt in the place of the engine's own for this block.

    What the engine itself does between its barriers is made to fail later too: making
    the states (of the user's scheduler, say), writing the recovery script and, under
    NVMe offload, copying the swap folder by ``shutil.copytree``.
    """
    original, copytree = internals(engine).checkpoint_engine, shutil.copytree
    internals(engine).checkpoint_engine = writer = writer_class(original)
    steps = [name for name in _STEPS if hasattr(engine, name)]
    copies_swap_folder = offloads_optimizer_to_nvme(engine)
    for name in steps:
        setattr(engine, name, writer.later(getattr(engine, name)))
    if copies_swap_folder:
        shutil.copytree = writer.later(copytree)
    try:
        yield writer
    finally:
        internals(engine).checkpoint_engine = original
        for name in steps:
            delattr(engine, name)
        if copies_swap_folder:
            shutil.copytree = copytree
