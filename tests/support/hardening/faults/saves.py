"""Saves of two ranks with a file operation of one of them failing: both commit or both refuse.

Full disk, quota, I/O error (once, and for good), failing sync, EINTR, short reads and writes, in
the foreground and in the background. Checkpoints of another run are in the folder, and stay.
``tests/training/test_saver.py`` has some of them at every operation; ranks that are killed:
``scripts/kills/kill_sweep.py``.

``python saves.py FOLDER SECONDS SEED NOTES`` is the two ranks; NOTES may be "".
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from paths import PATHS

sys.path[:0] = PATHS
from hardening import two_ranks  # noqa: E402
from hardening.notes import Notes, read  # noqa: E402
from hardening.two_ranks import Done, Task  # noqa: E402

SPARE = 300.0  # seconds to start ranks, on a machine that does much else
KINDS = ("eio", "enospc", "edquot", "fsync", "eintr", "short")
HARMLESS = ("eintr", "short")
OTHERS_LAST = 1_000_000  # step of another run's last checkpoint
CAUSES = "Input/output error", "No space left on device", "Disk quota exceeded"


def run(seconds: float, seed: int, work: Path, notes: Path | None = None) -> dict[str, Any]:
    """Saves with faults for about so long; what came of it.

    With ``notes`` (``noted``) what was done before is not done again, and is counted as done.
    """
    limit = seconds + 2 * SPARE
    two_ranks.run(__file__, work, limit, seconds, seed, notes or "")
    found: dict[str, Any] = json.loads((work / "found").read_text())
    return found


def front(task: Task) -> Done:
    """One rank. Both draw the same faults, and stop when rank 0 says that the time is over."""
    import torch
    import torch.distributed as dist
    from faults import faults
    from fixture_specs import Spec
    from live_worker import start, train

    import ckpt
    from ckpt.runs.lease import lease
    from ckpt.runs.manifest import check
    from ckpt.runs.run import Run
    from ckpt.saving.commit import identity
    from converters.errors import CheckpointError

    rank, folder = dist.get_rank(), task.out / "run"
    seconds, seed, path = task.case
    engine = start(Spec(2))
    train(engine, 1)
    lease.BEAT = 3600.0  # its writes are no part of a save, and come when they like
    with ckpt.Saver(engine, folder) as other:
        other.save(2)
        other.save(OTHERS_LAST)
    others = [c.manifest for c in Run(folder).checkpoints()]
    identity._launches.clear()  # as if by another process
    identity.begin(engine)
    dist.barrier()
    kept: dict[str, Any] = {"retention": ckpt.Retention(last=1), "weights": "bf16", "timeout": 30}
    savers = [ckpt.Saver(engine, folder, background=later, **kept) for later in (False, True)]
    step = 1
    savers[0].save(step)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for later, by in itertools.product((0, 1), (0, 1)):
        faults.set_here(folder, reads=1)
        savers[later].save(step := step + 1)
        savers[later].wait()
        counts[later, by] = faults.count_here() if rank == by else 0
        faults.stop_here()
    dist.all_reduce(counts)
    todo = [
        (by, at, kind, sticky, later)
        for later, by in itertools.product((0, 1), (0, 1))
        for at in range(1, int(counts[later, by]) + 1)
        for kind, sticky in itertools.product(KINDS, (False, True))
        if not (sticky and kind == "eintr")
    ]
    done = read(Path(path), "saves") if path else {}
    findings = [line for wrong in done.values() for line in wrong]
    dist.barrier()  # rank 0 writes only when the other has read
    notes = Notes(Path(path), "saves") if path and not rank else None
    mine = torch.tensor([int(notes is None or notes.mine)])
    dist.broadcast(mine, 0)
    total, todo = len(todo), [fault for fault in todo if fault not in done and mine]
    random.Random(seed).shuffle(todo)
    ends, end = Counter[str](), time.monotonic() + seconds
    for number, (by, at, kind, sticky, later) in enumerate(todo):
        going = torch.tensor([int(time.monotonic() < end)])
        dist.broadcast(going, 0)
        if not going:
            break
        if rank == by:
            faults.set_here(folder, at, kind, sticky=sticky, reads=1)
        failure = ""
        try:
            savers[later].save(step + 1)
            savers[later].wait()
        except CheckpointError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        faults.stop_here()
        dist.barrier()
        told: list[Any] = [None, None]
        dist.all_gather_object(told, failure)
        where = f"{kind}{' for good' if sticky else ''} at {at} of rank {by}: {told}"
        where = f"{'background, ' if later else ''}{where}"
        wrong: list[str] = []
        newest = Run(folder).newest()
        held = newest.manifest if newest else None
        if bool(told[0]) != bool(told[1]):
            wrong.append(f"save: one rank failed and one did not ({where})")
        fits = {step + (not failure)}
        if sticky and kind == "eio":  # no rename can be taken back where nothing works any more
            fits |= {step + 1}
        if newest is None or held is None or newest.step not in fits:
            wrong.append(f"save: the newest is {newest and newest.step} of {step} ({where})")
        elif (path or not number % 10) and (spoilt := check(newest.folder, held, data=True)):
            wrong.append(f"save: {spoilt[0]} ({where})")
        if failure and kind in HARMLESS:
            wrong.append(f"save: it failed ({where})")
        if failure and not any(cause in failure for cause in CAUSES):
            wrong.append(f"save: the cause is not said ({where})")
        if failure and (len(failure.splitlines()) > 1 or str(folder) not in failure):
            wrong.append(f"save: no line that names a file ({where})")
        findings += wrong
        if notes:
            notes.add((by, at, kind, sticky, later), wrong)
        ends["refused" if failure else "committed"] += 1
        ends["leftovers"] += bool(failure and list(folder.glob(".*.saving")))
        step = newest.step if newest and newest.step else step
        dist.barrier()
    for saver in savers:
        saver.close()
    intact = [
        c.manifest
        for c in Run(folder).checkpoints()
        if c.manifest in others and c.manifest and not check(c.folder, c.manifest, data=True)
    ]
    if len(intact) != len(others):
        findings.append(f"save: of {len(others)} checkpoints of another run {len(intact)} are left")
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if left:
        findings.append(f"save: {left} is left after saves that went well")
    if not rank:
        probes = len(done) + ends["refused"] + ends["committed"]
        found = {"operations": int(counts.sum()), "probes": probes, "of": total} | dict(ends)
        (task.out / "found").write_text(json.dumps(found | {"findings": findings}))
    dist.barrier()
    return Done()


def main() -> None:
    """Two forks of this process."""
    out, seconds, seed, notes = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    two_ranks.ready(seconds + SPARE)
    two_ranks.forked(front, Task(out, (seconds, seed, notes)), out / "logs")


if __name__ == "__main__":
    main()
