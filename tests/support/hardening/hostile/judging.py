"""A hostile file in place of a real one, opened as a user would, under watch."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.weights.conversion import convert
from converters.errors import CheckpointError
from hardening.hostile.files import Hostile

SECONDS, BYTES = 2.0, 64 << 20  # seconds of the processor: those of a busy clock say nothing
TOO_LONG = 20  # such seconds after which a file is given up


class TooLongError(BaseException):
    """It took ``TOO_LONG``."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a file. ``answer``: a kind of ``CheckpointError``, "right", or what is wrong."""

    hostile: Hostile
    answer: str
    message: str
    seconds: float
    nbytes: int

    def wrong(self, canary: Path) -> str | None:
        """A line if this is a finding."""
        where = f"{self.hostile.kind}: {self.hostile.name}"
        if canary.exists():
            canary.unlink()
            return f"{where}: the canary was touched"
        known = self.answer in ("corrupt", "incomplete", "refused", "unsupported", "output")
        if not known and not (self.answer == "right" and self.hostile.inert):
            return f"{where}: {self.answer} {self.message}"
        if self.seconds > SECONDS or self.nbytes > BYTES:
            return f"{where}: {self.answer} after {self.seconds:.1f} s and {self.nbytes >> 20} MiB"
        if "\n" in self.message or (not self.message.isprintable() and known):
            return f"{where}: its message is not one clean line: {self.message!r}"
        return None


class Target:
    """A copy of a checkpoint, one file of which is replaced again and again."""

    def __init__(self, source: Path, name: str, work: Path):
        self.folder = work / "checkpoint"
        shutil.copytree(source, self.folder)
        memory = Path("/dev/shm")  # where an fsync costs nothing
        self.scratch = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else work)
        self.output = Path(self.scratch.name) / "out"
        self.path = self.folder / name
        self.real = self.path.read_bytes()
        self.right = self.weights()

    def weights(self) -> Mapping[str, str]:
        """Converts, and returns the digests of the shards; the output is gone afterwards."""
        try:
            convert.run(convert.prepare(self.folder, self.output), workers=1)
            return {
                path.name: sha256(path.read_bytes()).hexdigest()
                for path in sorted(self.output.glob("*.safetensors"))
            }
        finally:
            shutil.rmtree(self.output, ignore_errors=True)

    def judge(self, hostile: Hostile) -> Verdict:
        """Opens the checkpoint with the file in it."""
        self.path.write_bytes(hostile.data)
        answer, message = "right", ""
        with watched() as seen:
            try:
                if self.weights() != self.right:
                    answer = "other weights, and no error"
            except CheckpointError as error:
                answer, message = error.kind, str(error)
            except TooLongError:
                answer = "no end"
            except (Exception, RecursionError, MemoryError) as error:
                answer = f"{type(error).__name__}, a traceback:"
                message = str(error)[:300]
        return Verdict(hostile, answer, message, seen["seconds"], seen["nbytes"])


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Seconds, and bytes that the process grew by at most; raises ``TooLongError`` in time."""
    seen: dict[str, Any] = {}
    gc.collect(1)  # all of it would take longer than most files
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began = held("VmRSS"), time.process_time()
    previous = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, TOO_LONG)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        seen["seconds"] = time.process_time() - began
        seen["nbytes"] = max(0, held("VmHWM") - before)


def held(kind: str) -> int:
    """A size of this process in bytes, by its name in /proc/self/status."""
    found = re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _stop(*_: Any) -> None:
    raise TooLongError
