"""One rank of a training that may be asked to stop, without any engine: ``launch_worker.py OUT``.

Each step is a collective and takes STEP_SECONDS. After the last one all ranks go through a save of
their own and write the step. PART=agree tries how they agree, in one launch.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ckpt.distributed.ranks import RankGroup
from ckpt.saving.preemption import EXIT_CODE, Preemption, PreemptionWatch, share_deadline
from converters.errors import CheckpointError

PATIENCE = 20  # seconds until a rank counts as absent
TRIALS = 40


def trains(out: Path) -> None:
    """Steps until somebody asks to stop; then a save and the exit code."""
    rank = dist.get_rank()
    watch = PreemptionWatch(Preemption(file=out / "stop"), timeout=PATIENCE)
    seconds = float(os.environ.get("STEP_SECONDS", "0.05"))
    (out / f"pid{rank}").write_text(str(os.getpid()))
    (out / f"started{rank}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}").touch()
    for step in range(1, 2000):
        dist.all_reduce(torch.zeros(1))
        time.sleep(seconds)
        (out / f"at{rank}").write_text(str(step))
        if not watch.due(step):
            continue
        left, _ = share_deadline(RankGroup("stop", PATIENCE), watch.seconds_left(), None)
        with RankGroup("save", PATIENCE).step():
            told = {"step": step, "left": left, "by": watch.asked_by}
            (out / f"saved{rank}").write_text(json.dumps(told))
        dist.barrier()
        RankGroup("stop", PATIENCE).leave(wait=not rank)
        watch.leave()
        raise SystemExit(EXIT_CODE)
    raise AssertionError("it went on")


def agree(out: Path) -> None:
    """Signals on some ranks, before or after a step ends: all stop at the same one."""
    everyone = range(dist.get_world_size())
    told: dict[str, object] = {
        "all": last_of(dict.fromkeys(everyone, (2, 0.0)), 0.3),
        "one": last_of({1: (2, 0.0)}, 0.3),
        "accumulating": last_of(dict.fromkeys(everyone, (2, 0.0)), 0.1, between=False),
        "slow ranks": last_of(dict.fromkeys(everyone, (2, 0.0)), 0.5, late=0.3),
    }
    draws = random.Random(7)
    trials = []
    for _ in range(TRIALS):
        some = draws.sample(everyone, draws.randint(1, len(everyone)))
        asked = {rank: (draws.randint(2, 4), draws.choice((0.0, 0.02))) for rank in some}
        first = min(step for step, _ in asked.values())
        trials.append([first, *last_of(asked, 0.01, late=draws.choice((0.0, 0.01)))])
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told | {"trials": trials}))


def last_of(
    asked: Mapping[int, tuple[int, float]], seconds: float, between: bool = True, late: float = 0
) -> list[int]:
    """The step at which each rank stops; ``asked`` by rank: in which step, seconds before its end.

    ``late``: how much later each rank is at the end of a step than the one before.
    """
    rank = dist.get_rank()
    watch = PreemptionWatch(Preemption(signals=("SIGUSR1",)), timeout=PATIENCE)
    last = 0
    for step in range(1, 100):
        dist.all_reduce(torch.zeros(1))
        time.sleep(seconds + late * rank)
        if rank in asked and asked[rank][0] == step:
            time.sleep(asked[rank][1])
            os.kill(os.getpid(), signal.SIGUSR1)
        if watch.due(step, between):
            last = step
            break
    watch.close()
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([last]))
    return [int(each) for each in found]


def main(out: Path) -> None:
    tasks = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, there in tasks.items():
        if name not in os.environ:
            os.environ[name] = os.environ[there]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    agree(out) if os.environ.get("PART") == "agree" else trains(out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[-1]))  # deepspeed puts --local_rank before it
    except CheckpointError as error:
        print(f"told: {error}", file=sys.stderr, flush=True)
        raise
