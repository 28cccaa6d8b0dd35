"""Saves of two ranks with a file operation of one of them failing: both commit or both refuse.

Full disk, quota, I/O error (once, and for good), failing sync, EINTR, short reads and writes, in
the foreground and in the background; of a training with ZeRO alone, with tensor parallelism, a
pipeline and experts (``kill_parallel``). Checkpoints of another run are in the folder, and stay.
``tests/training/test_saver.py`` has some of them at every operation; ranks that are killed:
``scripts/kills/kill_sweep.py``.

Each rank runs this as a program, ``saves.py FOLDER``, as a fork of the warm process that has the
library of ``faults``. FOLDER/attack.json says what is to be tried, FOLDER/found what came of it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
from paths import PATHS, ROOT

sys.path[:0] = [*PATHS, str(ROOT / "scripts/kills")]
import ending  # noqa: E402
import extensions  # noqa: E402
import warm_ranks  # noqa: E402
from faults import faults  # noqa: E402

from hardening.notes import Notes, read  # noqa: E402

TRAININGS = ("zero", "tensor", "pipeline", "experts")
SPARE = 300.0  # seconds to start ranks, on a machine that does much else
KINDS: tuple[faults.Fault, ...] = ("eio", "enospc", "edquot", "fsync", "eintr", "short")
HARMLESS = ("eintr", "short")
OTHERS_LAST = 1_000_000  # step of another run's last checkpoint
CAUSES = "Input/output error", "No space left on device", "Disk quota exceeded"
TAKES_SPACE = {*faults.WRITES, "open", "mkdir", "fallocate"}


@dataclass(frozen=True, slots=True)
class Attack:
    """What is tried: faults of saves of a training, for about so long or so many of them.

    With ``notes`` what was done before is not done again, and is counted as done.
    """

    training: str
    seconds: float
    seed: int
    points: int | None = None
    notes: str = ""


class Fault(NamedTuple):
    """At operation ``at`` of rank ``by``, which fails in a way, perhaps for good; of a save in the
    background if it comes ``later``."""

    by: int
    at: int
    kind: faults.Fault
    is_sticky: bool
    later: int

    def __str__(self) -> str:
        place = "background, " if self.later else ""
        lasting = " for good" if self.is_sticky else ""
        return f"{place}{self.kind}{lasting} at {self.at} of rank {self.by}"


def run(attack: Attack, work: Path) -> dict[str, Any]:
    """Saves with faults; what came of it. ``RuntimeError`` if the ranks fail."""
    work.mkdir(parents=True)
    (work / "attack.json").write_text(json.dumps(asdict(attack)))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the warm process reads it, too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ended = warm_ranks.run(
        __file__,
        [work],
        ranks=2,
        limit=attack.seconds + SPARE,
        environment=extensions.environment(),
    )
    if ended.returncode:
        raise RuntimeError(f"the saves of {attack.training} failed: {ended.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((work / "found").read_text())
    return found


def engine_of(training: str) -> Any:
    """The engine of a training on two ranks, which has done a step."""
    if training == "zero":
        from fixture_specs import Spec
        from live_worker import start, train

        engine = start(Spec(2))
        train(engine, 1)
        return engine

    import kill_parallel

    make, train_step = kill_parallel.TRAININGS[training]
    engine = make(None)  # type: ignore[arg-type]  # a task, of which it asks nothing
    train_step(engine, 1)
    return engine


class Sweep:
    """One rank's part in the saves; every rank makes the same calls."""

    def __init__(self, out: Path, attack: Attack) -> None:
        import torch.distributed as dist

        import ckpt
        from ckpt.runs.lease import lease
        from ckpt.runs.run import Run
        from ckpt.saving.commit import identity

        self.attack, self.out, self.folder = attack, out, out / "run"
        self.rank, self.ends = dist.get_rank(), Counter[str]()
        lease.BEAT = 3600.0  # its writes are no part of a save, and come when they like

        engine = engine_of(attack.training)
        with ckpt.Saver(engine, self.folder) as other_saver:
            other_saver.save(2)
            other_saver.save(OTHERS_LAST)
        self.others = [checkpoint.manifest for checkpoint in Run(self.folder).checkpoints()]

        identity._launches.clear()  # as if by another process
        identity.begin(engine)
        dist.barrier()
        options: dict[str, Any] = {"weights": "bf16", "timeout": 30}
        self.savers = [
            ckpt.Saver(
                engine, self.folder, background=later, retention=ckpt.Retention(last=1), **options
            )
            for later in (False, True)
        ]
        self.step = 1
        self.savers[0].save(self.step)

    def operations(self, by: int, later: int) -> list[str]:
        """The file operations of an undisturbed save on a rank, in order."""
        import torch.distributed as dist

        log = self.out / f"operations-{by}-{later}"
        if self.rank == by:
            faults.set_here(self.folder, log=log, reads=1)
        self.step += 1
        self.savers[later].save(self.step)
        self.savers[later].wait()
        faults.stop_here()
        calls = [[operation.call for operation in faults.journal(log)]]
        dist.broadcast_object_list(calls, by)
        return calls[0]

    def faults(self) -> list[Fault]:
        """All that there are: each operation, in each way in which it can fail."""
        all_faults = []
        for later, by in itertools.product((0, 1), (0, 1)):
            calls = self.operations(by, later)
            self.ends["operations"] += len(calls)
            for at, call in enumerate(calls, 1):
                all_faults += [
                    Fault(by, at, kind, is_sticky, later) for kind, is_sticky in _ways_of(call)
                ]
        return all_faults

    def probe(self, fault: Fault, is_read_again: bool) -> Iterator[str]:
        """Saves with a fault; what is wrong then."""
        import torch.distributed as dist

        from converters.errors import CheckpointError

        if self.rank == fault.by:
            faults.set_here(self.folder, fault.at, fault.kind, sticky=fault.is_sticky, reads=1)
        failure = ""
        try:
            self.savers[fault.later].save(self.step + 1)
            self.savers[fault.later].wait()
        except CheckpointError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        faults.stop_here()
        dist.barrier()
        failures: list[str] = ["", ""]
        dist.all_gather_object(failures, failure)
        yield from (f"{line} ({fault}: {failures})" for line in self._judge(fault, failures))
        yield from self._judge_newest(fault, failure, is_read_again)

        self.ends["refused" if failure else "committed"] += 1
        self.ends["leftovers"] += bool(failure and list(self.folder.glob(".*.saving")))
        dist.barrier()
        if failure:
            yield from (f"{line} ({fault})" for line in self._save_undisturbed(fault.later))

    def _save_undisturbed(self, later: int) -> Iterator[str]:
        """The next save; what is wrong with it, and with what lies in the folder then."""
        import torch.distributed as dist

        from ckpt.runs.run import Run

        self.step += 1
        try:
            self.savers[later].save(self.step)
            self.savers[later].wait()
        except Exception as error:
            yield f"save: the next one failed: {type(error).__name__}: {error}"
        dist.barrier()
        newest = Run(self.folder).newest()
        if newest is None or newest.step != self.step:
            yield f"save: the newest is {newest and newest.step} after one of {self.step}"
        staged = [path.name for path in self.folder.glob(".*.saving")]
        if staged:  # while a thread may still delete what retention does not keep
            yield f"save: {staged} is left after one that went well"
        dist.barrier()

    def _judge(self, fault: Fault, failures: list[str]) -> Iterator[str]:
        failure = failures[self.rank]
        if bool(failures[0]) != bool(failures[1]):
            yield "save: one rank failed and one did not"
        if failure and fault.kind in HARMLESS:
            yield "save: it failed"
        if failure and not any(cause in failure for cause in CAUSES):
            yield "save: the cause is not said"
        if failure and (len(failure.splitlines()) > 1 or str(self.folder) not in failure):
            yield "save: no line that names a file"

    def _judge_newest(self, fault: Fault, failure: str, is_read_again: bool) -> Iterator[str]:
        """Whether the newest checkpoint is the one before or the new one, and whole."""
        from ckpt.runs.manifest import check
        from ckpt.runs.run import Run

        newest = Run(self.folder).newest()
        fitting_steps = {self.step + (not failure)}
        if fault.is_sticky and fault.kind == "eio":  # no rename can be taken back then
            fitting_steps.add(self.step + 1)
        if newest is None or newest.manifest is None or newest.step not in fitting_steps:
            yield f"save: the newest is {newest and newest.step} of {self.step} ({fault})"
        elif is_read_again and (problems := check(newest.folder, newest.manifest, data=True)):
            yield f"save: {problems[0]} ({fault})"
        if newest is not None and newest.step:
            self.step = newest.step

    def end(self) -> Iterator[str]:
        """Closes the savers; what is wrong with all that is left."""
        from ckpt.runs.manifest import check
        from ckpt.runs.run import Run

        for saver in self.savers:
            saver.close()
        intact = [
            checkpoint.manifest
            for checkpoint in Run(self.folder).checkpoints()
            if checkpoint.manifest in self.others
            and checkpoint.manifest
            and not check(checkpoint.folder, checkpoint.manifest, data=True)
        ]
        if len(intact) != len(self.others):
            yield f"save: of {len(self.others)} checkpoints of another run {len(intact)} are left"
        left = [path.name for path in self.folder.iterdir() if path.name.startswith(".")]
        if left:
            yield f"save: {left} is left at the end"


def _ways_of(call: str) -> Iterator[tuple[faults.Fault, bool]]:
    """How an operation can fail, and whether for good; others would fail a later one instead."""
    for kind, is_sticky in itertools.product(KINDS, (False, True)):
        if is_sticky and kind == "eintr":
            continue
        if kind in ("enospc", "edquot") and call not in TAKES_SPACE:
            continue
        if kind == "fsync" and call not in ("fsync", "fdatasync"):
            continue
        yield kind, is_sticky


def _of_all_ranks(lines: list[str]) -> list[str]:
    """The lines that ranks found, each once."""
    import torch.distributed as dist

    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, lines)
    return list(dict.fromkeys(itertools.chain.from_iterable(gathered)))


def attack_saves(out: Path, attack: Attack) -> None:
    """One rank. All draw the same faults, and stop when rank 0 says that the time is over."""
    import torch
    import torch.distributed as dist

    sweep = Sweep(out, attack)
    faults_to_try = sweep.faults()
    total, path = len(faults_to_try), Path(attack.notes) if attack.notes else None
    done = read(path, "saves") if path else {}
    findings = [line for wrong in done.values() for line in wrong]
    dist.barrier()  # rank 0 writes only when the other has read

    notes = Notes(path, "saves") if path and not sweep.rank else None
    is_free = torch.tensor([int(notes is None or notes.mine)])
    dist.broadcast(is_free, 0)
    faults_to_try = [fault for fault in faults_to_try if fault not in done and is_free]
    random.Random(attack.seed).shuffle(faults_to_try)
    if path:  # of all, those come first that end a save and do not last
        faults_to_try.sort(key=lambda fault: fault.is_sticky or fault.kind in HARMLESS)
    end = time.monotonic() + attack.seconds
    for number, fault in enumerate(faults_to_try[: attack.points]):
        has_time = torch.tensor([int(time.monotonic() < end)])
        dist.broadcast(has_time, 0)
        if not has_time:
            break
        is_read_again = path is not None or not number % 10
        wrong = _of_all_ranks(list(sweep.probe(fault, is_read_again)))
        findings += wrong
        if notes:
            notes.add(fault, wrong)

    findings += _of_all_ranks(list(sweep.end()))
    if not sweep.rank:
        probes = len(done) + sweep.ends["refused"] + sweep.ends["committed"]
        found = {"operations": 0, "probes": probes, "of": total, **sweep.ends}
        (out / "found").write_text(json.dumps({**found, "findings": findings}))
    dist.barrier()


def main() -> None:
    """A rank that the warm process has forked."""
    import deepspeed

    out = Path(sys.argv[1])
    attack = Attack(**json.loads((out / "attack.json").read_text()))
    deepspeed.init_distributed(dist_backend="gloo")
    attack_saves(out, attack)
    ending.leave()


if __name__ == "__main__":
    main()
