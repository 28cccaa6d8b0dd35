"""Checkpoints far larger than usual: 100,000 tensors, a tensor of 200 GB, 1,024 ranks.

They are made as DeepSpeed would (scripts/fixtures/big_checkpoint.py), the large tensor as a hole,
and read by the real commands, each in a process of its own that may hold ``FILES`` files open.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paths import ROOT

MIB = 1 << 20
CAP = 256 * MIB  # bytes of memory at the peak
FILES = 128  # open files
LINEAR = 1.6  # how much more than twice as long twice as many tensors may take
_RUN = """
import atexit, sys, time
def tell():
    peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
    print("measured", peak, time.process_time(), file=sys.stderr)
atexit.register(tell)
from ckpt.cli.main import main
main()
"""


class Measured(NamedTuple):
    """What a command did: exit code, bytes of memory at the peak, seconds of CPU, and its words."""

    code: int
    peak: int
    seconds: float
    said: str


def measured(*words: object, limit: float = 600) -> Measured:
    """Runs ``ckpt`` with few files to open."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=ROOT,
        preexec_fn=few,
    )
    said, _, numbers = done.stderr.rpartition("measured ")
    kilobytes, seconds = numbers.split()
    return Measured(done.returncode, int(kilobytes) << 10, float(seconds), said + done.stdout)


def many_tensors(folder: Path, count: int, stage: int) -> Path:
    """Two ranks, ``count`` tensors of 4 or 8 elements."""
    import torch
    from big_checkpoint import write
    from llama_shapes import EMBEDDING

    shapes = {EMBEDDING: torch.Size((16, 4))}
    for at in range(count - 1):
        shape = torch.Size((2, 4) if at % 2 else (4,))
        shapes[f"model.layers.{at // 10}.part{at % 10}.weight"] = shape
    write(folder, shapes, stage, 2)
    return folder


def many_ranks(folder: Path, world: int, stage: int) -> Path:
    """A model of 7 tensors and 3,000 elements: several ranks share a row, some have padding."""
    import torch
    from big_checkpoint import write
    from llama_shapes import EMBEDDING

    shapes = {EMBEDDING: torch.Size((100, 16)), "model.norm.weight": torch.Size((13,))}
    shapes |= {f"model.layers.{at}.weight": torch.Size((277,)) for at in range(5)}
    write(folder, shapes, stage, world)
    return folder


def huge_tensor(folder: Path, nbytes: int) -> Path:
    """One fp32 tensor of so many bytes on one rank under ZeRO-3; its bytes are a hole."""
    import torch
    from big_checkpoint import TAG, adam, model_states, save

    numel, backing = nbytes // 4, folder / "hole"
    (folder / TAG).mkdir(parents=True)
    with open(backing, "wb") as file:
        file.truncate(nbytes)
    held = torch.UntypedStorage.from_file(str(backing), shared=True, nbytes=nbytes)
    flat = torch.empty(0).set_(held, 0, (numel,))  # type: ignore[call-overload]
    optimizer = {
        "zero_stage": 3,
        "partition_count": 1,
        "optimizer_state_dict": adam([[[flat, flat, flat]], []]),
        "fp32_flat_groups": [flat],
    }
    shapes = {"model.weight": torch.Size((numel,))}
    path = folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    save({"optimizer_state_dict": optimizer}, path, 3, True)
    path = folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    save(model_states(3, shapes, 0, 1, False), path, 3, True)
    (folder / "latest").write_text(TAG)
    del flat, held, optimizer
    backing.unlink()
    return folder


def findings(what: str, found: Measured) -> Iterator[str]:
    """What is wrong with it. That the disk has no room is right to say: dry runs do, too."""
    if found.code and "bytes free, the output needs" not in found.said:
        yield f"{what}: exit code {found.code}: {found.said.strip()[-300:]}"
    if found.peak > CAP:
        yield f"{what}: {found.peak // MIB} MiB of memory, at most {CAP // MIB} are promised"


def run(
    seconds: float, seed: int, work: Path, say: Callable[[str], None], count: int = 100_000
) -> Mapping[str, Any]:
    """All limits, once: takes minutes, whatever ``seconds`` says."""
    counted: dict[str, Any] = {}
    wrong: list[str] = []

    def note(what: str, *words: object) -> Measured:
        found = measured(*words)
        counted[what] = f"{found.peak // MIB} MiB, {found.seconds:.1f} s of CPU"
        wrong.extend(findings(what, found))
        say(f"{what}: {counted[what]}")
        return found

    for stage in (2, 3):
        took = {}
        for many in (count // 4, count):
            made = many_tensors(work / f"tensors-{stage}-{many}", many, stage)
            what = f"{many:,} tensors, stage {stage}"
            took[many] = note(f"{what}: show", "show", made).seconds
            note(f"{what}: to-fp32", "to-fp32", made, "-o", work / f"model-{stage}-{many}")
        if took[count] > 4 * LINEAR * max(took[count // 4], 0.5):
            wrong.append(f"{count:,} tensors, stage {stage}: {took} s, more than linear")
        made = many_ranks(work / f"ranks-{stage}", 1024, stage)
        what = f"1,024 ranks, stage {stage}"
        note(f"{what}: to-fp32", "to-fp32", made, "-o", work / f"ranks-model-{stage}")
        note(
            f"{what}: reshard to 2", "reshard", made, "--world-size", 2, "-o", work / f"two-{stage}"
        )
    made = huge_tensor(work / "huge", 200_000_000_000)
    note("a tensor of 200 GB: show", "show", made)
    note("a tensor of 200 GB: to-fp32 --dry-run", "to-fp32", made, "--dry-run")
    return {**counted, "findings": wrong}
