"""Hostile safetensors files: by our reader, and beside a checkpoint as its gathered weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from converters.errors import CheckpointError
from converters.formats import safetensors
from hardening.hostile import lies
from hardening.hostile.files import Hostile
from hardening.hostile.judging import Target, TooLongError, Verdict, watched

FIXTURES = Path(__file__).parents[4] / "fixtures"


def hostiles(large: bool = True) -> Iterator[Hostile]:
    """The files, one at a time."""
    for name, data in itertools.chain(lies.safetensors().items(), lies.large() if large else ()):
        yield Hostile("safetensors", name, data)


def opened(hostile: Hostile, path: Path) -> Verdict:
    """The file read alone."""
    path.write_bytes(hostile.data)
    answer, message = "accepted", ""
    with watched() as seen:
        try:
            safetensors.read(path)
        except CheckpointError as error:
            answer, message = error.kind, str(error)
        except TooLongError:
            answer = "no end"
        except (Exception, RecursionError, MemoryError) as error:
            answer, message = f"{type(error).__name__}, a traceback:", str(error)[:300]
    return Verdict(hostile, answer, message, seen["seconds"], seen["nbytes"])


def verdicts(work: Path, large: bool = True) -> Iterator[Verdict]:
    """Each file alone must be refused; beside a checkpoint it proves nothing and harms nothing."""
    work.mkdir(parents=True)
    target = Target(FIXTURES / "trainer-zero3/checkpoint-2", "model.safetensors", work)
    for hostile in hostiles(large):
        yield opened(hostile, work / "alone.safetensors")
        beside = Hostile(hostile.kind, f"{hostile.name}, gathered", hostile.data, inert=True)
        yield target.judge(beside)
