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
            except OSError as error:
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

    The engine itself writes two things between its barriers: the recovery script, on rank 0, and
    under NVMe offload each rank copies its swap folder, by ``shutil.copytree``. They are made to
    fail later too.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine = writer = ours(before)
    copies = bool(engine.zero_nvme_offload_optimizer())
    script, tree = getattr(engine, "_copy_recovery_script", None), shutil.copytree
    if script is not None:
        engine._copy_recovery_script = writer.later(script)
    if copies:
        shutil.copytree = writer.later(tree)
    try:
        yield writer
    finally:
        engine.checkpoint_engine = before
        if script is not None:
            del engine._copy_recovery_script
        if copies:
            shutil.copytree = tree
