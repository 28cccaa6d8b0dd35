"""DeepSpeed's own seam for how states become files, with a writer of ours in it.

``engine.save_checkpoint`` asks its ``checkpoint_engine`` to save each file (DeepSpeed
``runtime/checkpoint_engine/checkpoint_engine.py``: create, save, load, commit). Ours either takes
the states down, to be written when no rank waits in a barrier any more, or writes them at once, on
disk and digested. Neither raises in the middle: the other ranks would wait in a barrier for ever.
What failed is raised by ``require``, when all are out of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from ckpt.runs.manifest import File
from ckpt.saving import zips

_STEPS = ("_save_checkpoint", "_save_zero_checkpoint")  # between barriers, without any in them


class Taken(CheckpointEngine):
    """States as ``engine.save_checkpoint`` hands them over: ``captured``, not written."""

    def __init__(self, before: Any):
        super().__init__()
        self.before = before
        self.captured: list[tuple[Path, zips.Captured]] = []
        self.failure: Exception | None = None

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keeps the state; what cannot be pickled is a failure."""
        try:
            self._keep(Path(path), zips.capture(state_dict))
        except Exception as error:
            self.failure = self.failure or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As DeepSpeed's, but what fails is told later."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def later(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, but what fails is told later."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                self.failure = self.failure or error
                return None

        return wrapped

    def _keep(self, path: Path, state: zips.Captured) -> None:
        self.captured.append((path, state))

    def load(self, path: str, map_location: Any = None) -> Any:
        """As the engine would without us."""
        return self.before.load(path, map_location=map_location)

    def commit(self, info: Any) -> bool:
        """The saver commits, not DeepSpeed."""
        return True

    def require(self) -> None:
        """Raises what failed since the last call."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


class Written(Taken):
    """States on disk when ``save`` returns, under their final names; ``files`` has the digests."""

    def __init__(self, before: Any):
        super().__init__(before)
        self.files: dict[Path, File] = {}

    def _keep(self, path: Path, state: zips.Captured) -> None:
        self.files[path] = state.write(path)


@contextmanager
def put_in(engine: Any, ours: type[Taken]) -> Iterator[Taken]:
    """Ours in the engine's place for as long as the block lasts.

    What the engine itself does between its barriers is made to fail later too: making the states
    (of the user's scheduler, say), writing the recovery script and, under NVMe offload, copying the
    swap folder by ``shutil.copytree``.
    """
    before, tree = engine.checkpoint_engine, shutil.copytree
    engine.checkpoint_engine = writer = ours(before)
    steps = [name for name in _STEPS if hasattr(engine, name)]
    copies = bool(engine.zero_nvme_offload_optimizer())
    for name in steps:
        setattr(engine, name, writer.later(getattr(engine, name)))
    if copies:
        shutil.copytree = writer.later(tree)
    try:
        yield writer
    finally:
        engine.checkpoint_engine = before
        for name in steps:
            delattr(engine, name)
        if copies:
            shutil.copytree = tree
