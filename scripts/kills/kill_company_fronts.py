"""The trainings of ``kill_company.py``: the one that is killed or stopped, and the second job."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from forked_ranks import RANKS
from kill_fronts import EVERY, SWEPT, Task, Trained, engine_of, train_step
from kill_fronts_ckpt import KEEP, saver_loop

import ckpt
from ckpt.runs.lease import lease, lease_file, processes, watch
from ckpt.runs.lease.lease_file import NAME
from ckpt.runs.lease.processes import Life, ProcessIdentity
from ckpt.runs.run import Run
from converters.errors import CheckpointError

PATIENCE = 30.0  # seconds that a second job tries to get in
SILENCE = 0.6  # seconds without a beat; none comes (forked_ranks)
LATER = 1000  # the step that a second job saves beside the one of the same name
others: set[str] = set()  # ids of runs that were there before


@dataclass(frozen=True, slots=True)
class Visit:
    """What a second job did: ``refused`` so often; ``beside``: it got in and rank 0 was alive."""

    refused: int = 0
    entered: bool = False
    beside: bool = False
    said: str = ""


def looked_at(folder: Path) -> dict[str, str]:
    """Every file of a checkpoint."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in paths}


def beside(out: Path, word: str) -> Path:
    """A file of the sweep's own."""
    return out.with_name(f"{out.name}.{word}")


def newest(run: Path) -> Path:
    """The newest checkpoint of this training, among those of others."""
    mine = [
        c
        for c in Run(run).checkpoints()
        if c.committed
        and c.manifest
        and c.manifest.world_size == RANKS
        and c.manifest.run not in others
    ]
    if not mine:
        raise RuntimeError(f"{run} has no committed checkpoint of this training")
    return max(mine, key=lambda c: c.step or 0).folder


def loop(background: bool, task: Task) -> Trained:
    """A loop around a DeepSpeed engine and ``ckpt.Saver``, which ``ckpt.resume`` resumes."""
    watch.WATCH = watch.SHORT_WATCH = SILENCE

    def resume(task: Task, engine: Any) -> int:
        return ckpt.resume(engine, newest(task.out))

    def before_save(step: int) -> None:
        if step == SWEPT and task.armed and beside(task.out, "guest").exists():
            _await(beside(task.out, "ready").exists)
        task.before_save(step)

    return saver_loop(task, background, resume, before_save)


def visit(out: Path, elsewhere: bool, stays: bool) -> Visit:
    """A second job: tries to get into the folder until it is in; saves; and says what happened.

    ``elsewhere``: it is taken for one of another machine, comes when the others are stopped, and
    wakes them when it has saved; with ``stays`` it holds the folder until they have ended.
    """
    engine = _alone(out)
    holder = _holder(out)
    beside(out, "ready").touch()
    if elsewhere:
        _await(lambda: _state(holder) in "TZX")
        processes._machine = lambda: "elsewhere"
    watch.WATCH = watch.SHORT_WATCH = SILENCE
    watch.GRACE, lease.BEAT = 0.0, 3600.0
    saver, refused, said = None, 0, ""
    end = time.monotonic() + PATIENCE
    while saver is None and time.monotonic() < end:
        try:
            saver = ckpt.Saver(engine, out, retention=KEEP, timeout=3.0)
        except CheckpointError as error:
            refused, said = refused + 1, str(error)
            if "is in use: host " not in said or f"pid {holder.pid} " not in said:
                raise
            time.sleep(0.02)
    if saver is None:
        return Visit(refused, said=said)
    both = not elsewhere and holder.life() is Life.ALIVE
    train_step(engine, 1)
    steps = (SWEPT, LATER) if elsewhere else (LATER,)
    for step in steps:
        try:
            ckpt.Saver(engine, out, timeout=3.0).save(step)
        except CheckpointError as error:  # those that are stopped still have its staging folder
            if step == LATER or f".checkpoint-{SWEPT}.saving is in use" not in str(error):
                raise
    saved = [c for c in Run(out).checkpoints() if c.manifest and c.manifest.world_size == 1]
    assert saved and all(c.committed for c in saved), saved
    note = {f"{c.name} of the second job": looked_at(c.folder) for c in saved}
    beside(out, "saved").write_text(json.dumps(note))
    if not stays:
        saver.close()
        lease.release_all()
    if elsewhere and _state(holder) not in "ZX":
        os.killpg(holder.pid, signal.SIGCONT)
        _await(lambda: _state(holder) in "ZX")
    saver.close()
    lease.release_all()
    return Visit(refused, True, both, said)


def _holder(out: Path) -> ProcessIdentity:
    """Rank 0 of the training, when it has saved once and before it saves again."""
    _await(
        lambda: (out / f"checkpoint-{EVERY}/manifest.json").exists() and _record(out) is not None
    )
    record = _record(out)
    assert record is not None
    return record


def _record(out: Path) -> ProcessIdentity | None:
    record = lease_file.read(out / NAME)
    return record.holder.process if record is not None and record.holder is not None else None


def _state(process: ProcessIdentity) -> str:
    """Its state as in /proc: T is stopped, X that it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return "X"
    return text.rpartition(")")[2].split()[0]


def _await(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError("the training did not come so far")
        time.sleep(0.005)


def _alone(out: Path) -> Any:
    """An engine of one rank."""
    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ["MASTER_PORT"] = port
    dist.init_process_group("gloo")
    return engine_of(Task(out, 2, 1, False))
