"""Other readers on the same hostile files, each in a process of its own.

    reader                        refuses by
    ckpt                          ``CheckpointError``, in place of a real file of a checkpoint
    torch.load(weights_only=True) an exception
    torch.load                    an exception; the control: it shows that the payloads are live
    picklescan                    issues found, or a scan error
    fickling                      any severity above "likely safe" of a pickle in the file
    safetensors                   an exception; safetensors files only

"over limits": more than 2 s of processor time or 64 MiB. picklescan and fickling: by hand.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hardening.hostile import files, gathered, judging
from hardening.hostile.files import Hostile
from hardening.hostile.judging import BYTES, SECONDS, watched

SLACK = 1 << 30  # bytes of address space beyond what the process has: the machine is shared
Reader = Callable[[Path], bool]  # whether it refuses, unless it raises


def _torch(path: Path) -> bool:
    import torch

    torch.load(path, weights_only=True)
    return False


def _torch_pickle(path: Path) -> bool:
    import torch

    torch.load(path, weights_only=False)
    return False


def _picklescan(path: Path) -> bool:
    from picklescan import scanner

    found = scanner.scan_file_path(str(path))
    return bool(found.issues_count or found.infected_files or found.scan_err)


def _fickling(path: Path) -> bool:
    import io

    from fickling.analysis import Severity, check_safety
    from fickling.fickle import Pickled

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            held = [archive.read(n) for n in archive.namelist() if n.endswith(".pkl")]
    else:
        held = [path.read_bytes()]
    for data in held:
        found = Pickled.load(io.BytesIO(data), fail_on_decode_error=False)
        if found.has_invalid_opcode or check_safety(found).severity != Severity.LIKELY_SAFE:
            return True
    return False


def _safetensors(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return not list(file.keys()) and False


READERS: dict[str, tuple[str, Reader]] = {
    "torch.load(weights_only=True)": ("torch", _torch),
    "torch.load, the control": ("torch", _torch_pickle),
    "picklescan": ("picklescan", _picklescan),
    "fickling": ("fickling", _fickling),
}


def judged(reader: Reader, path: Path, canary: Path) -> str:
    """What a reader makes of a file: refused, accepted, crashed, over limits, or canary."""
    canary.unlink(missing_ok=True)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        _in_child(reader, path, into)
    os.close(into)
    with os.fdopen(out) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if canary.exists():
        canary.unlink()
        return "canary touched"
    if not told or status:
        return "crashed or killed"
    answer, seconds, nbytes = json.loads(told)
    return "over limits" if seconds > SECONDS or nbytes > BYTES else str(answer)


def _in_child(reader: Reader, path: Path, into: int) -> None:
    """Reads the file and tells of it; never returns."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    warnings.simplefilter("ignore")
    limit = judging.held("VmSize") + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(1000)
    with watched() as seen:
        try:
            answer = "refused" if reader(path) else "accepted"
        except judging.TooLongError:
            answer = "no end"
        except BaseException:  # whatever a payload raises, SystemExit too
            answer = "refused"
    os.write(into, json.dumps((answer, seen["seconds"], seen["nbytes"])).encode())
    os._exit(0)


def table(
    seconds: float, seed: int, work: Path, say: Callable[[str], None]
) -> dict[str, dict[str, int]]:
    """Counts of answers by "class, reader", over as many files as the time allows."""
    import numpy  # noqa: F401  (before the forks, as what follows)
    import torch  # noqa: F401

    from hardening.hostile import others, target

    end = time.monotonic() + seconds
    work.mkdir()
    canary = work / "canary"
    goal, real = target("model states", work / "ours")
    hostiles = [*others(real), *files.every_code(real, canary)]
    random.Random(seed).shuffle(hostiles)
    counts: dict[str, Counter[str]] = {}

    def count(hostile: Hostile, reader: str, answer: str) -> None:
        counts.setdefault(f"{hostile.kind}, {reader}", Counter())[answer] += 1

    here = {name: read for name, (module, read) in READERS.items() if find_spec(module)}
    if len(here) < len(READERS):
        say(f"not installed: {', '.join(sorted(READERS.keys() - here.keys()))}")
    for hostile in gathered.hostiles():
        path = work / "x.safetensors"
        verdict = gathered.opened(hostile, path)
        refused = verdict.wrong(canary) is None
        count(hostile, "ckpt", "refused" if refused else "over limits")
        count(hostile, "safetensors", judged(_safetensors, path, canary))
    for hostile in itertools.chain(hostiles, files.codes(real, canary, seed, 2000)):
        if time.monotonic() > end:
            break
        verdict = goal.judge(hostile)
        wrong = verdict.wrong(canary)
        right = "inert, right weights" if verdict.answer == "right" else "refused"
        count(hostile, "ckpt", right if wrong is None else "finding")
        path = work / "x.pt"
        path.write_bytes(hostile.data)
        for name, read in here.items():
            count(hostile, name, judged(read, path, canary))
    return {key: dict(sorted(found.items())) for key, found in sorted(counts.items())}
