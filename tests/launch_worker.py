"""One rank of a training that may be asked to stop: ``launch_worker.py OUT_DIR``; no engine.

Each step is a collective and takes STEP_SECONDS. The last one is "saved": all ranks go through
``Ranks`` and a barrier, and write the step that they stopped at.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ckpt.ranks import Ranks
from ckpt.saving.preemption import EXIT_CODE, Preemption, Watch, share
from converters.errors import CheckpointError


def main(out: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    watch = Watch(Preemption(file=out / "stop"), timeout=20)
    seconds = float(os.environ.get("STEP_SECONDS", "0.05"))
    (out / f"pid{rank}").write_text(str(os.getpid()))
    (out / f"started{rank}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}").touch()
    for step in range(1, 2000):
        dist.all_reduce(torch.zeros(1))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        (out / f"at{rank}").write_text(str(step))
        if not watch.due(step):
            continue
        left, _ = share(Ranks("stop", 20), watch.left(), None)
        with Ranks("save", 20).step():
            told = {"step": step, "left": left, "by": watch.by}
            (out / f"saved{rank}").write_text(json.dumps(told))
        dist.barrier()
        last = Ranks("stop", 20)
        last.leave(wait=not rank)
        watch.leave()
        raise SystemExit(EXIT_CODE)
    raise AssertionError("it went on")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[-1]))  # deepspeed puts --local_rank before it
    except CheckpointError as error:
        print(f"told: {error}", file=sys.stderr, flush=True)
        raise
