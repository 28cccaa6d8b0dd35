"""One rank of a training whose checkpoints are pushed: ``push_saver_worker.py OUT_DIR PART``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hub_server import Hub
from live_worker import SMALL, start, train

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import Spec

import ckpt
from converters.errors import CheckpointError

WRONG = "hf_" + "wrong" * 7
HELD = {"path": "/preupload/", "status": 429, "retry_after": 3, "times": None}  # 15 s of trying


def server() -> Hub:
    return Hub(os.environ["HF_ENDPOINT"], Path(os.environ["HUB_FOLDER"]))


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """On rank 0; all ranks go on together."""
    end = time.monotonic() + seconds
    while not dist.get_rank() and not true():
        assert time.monotonic() < end
        time.sleep(0.05)
    dist.barrier()


def follow(out: Path) -> None:
    """Pushes of every second step of a training that goes on, one of them slow."""
    spec, told, run = Spec(3, zero=SMALL), list[str](), out / "run"
    catch = logging.Handler()
    catch.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt").addHandler(catch)
    engine = start(spec)
    undisturbed = train(engine, 9)
    engine.destroy()

    engine, losses = start(spec), []
    push = ckpt.Push("org/tiny", every=2, dtype="bf16", revision="step-{step}", required=True)
    last = ckpt.Retention(last=1)
    saver = ckpt.Saver(engine, run, every=1, retention=last, background=True, push=push)
    pushes = saver.pushes
    if not dist.get_rank():
        server().fault("status", **HELD)
    dist.barrier()
    for step in range(1, 10):
        losses += train(engine, 1)
        saver.step(step)
        saver.wait()
        if step == 6 and not dist.get_rank():
            assert pushes.running is not None and pushes.running.step == 2
            assert pushes.waiting is not None and pushes.waiting.step == 6
            assert os.getsid(pushes.running.child.process.pid) != os.getsid(0)
            saver.pool.submit(int).result()  # behind the deletions
            there = {path.name for path in run.glob("checkpoint-*")}
            assert there == {"checkpoint-2", "checkpoint-6"}, there
            assert [line for line in told if "not pushed" in line] == [
                "step 4 is not pushed: step 6 is newer, and the push of step 2 takes long"
            ]
            server().no_faults()
        if step == 6:
            until(lambda: pushes.poll() or not (pushes.running or pushes.waiting))
    saver.close()
    assert losses == undisturbed, (losses, undisturbed)
    if not dist.get_rank():
        assert not list(run.glob(".push*")) and len(told) and "goes on" not in " ".join(told)
    engine.destroy()


def fail(out: Path) -> None:
    """Pushes that fail or take too long: the training goes on, and is told how to complete them."""
    rank, run = dist.get_rank(), out / "run"
    engine = start(Spec(2))
    token, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], WRONG
    told: dict[str, Any] = {}
    for required in (False, True):
        push = ckpt.Push("org/failed", required=required)
        saver = ckpt.Saver(engine, run, push=push)
        step = 1 + 2 * required
        saver.save(step)
        until(lambda s=saver: not s.pushes.running or s.pushes.running.child.over)
        saver.step(step)  # says it
        try:
            saver.close()
        except CheckpointError as error:
            told["required"] = str(error)
        saver.close()
    os.environ["HF_TOKEN"] = token
    if not rank:
        server().fault("status", **HELD)
    dist.barrier()
    saver = ckpt.Saver(engine, run, push=ckpt.Push("org/late", every=10, last=True, timeout=1))
    saver.save(4)
    began = time.monotonic()
    saver.close()
    told["waited"] = time.monotonic() - began
    began = time.monotonic()
    try:
        with ckpt.Saver(engine, run, push=ckpt.Push("org/left"), timeout=60) as saver:
            saver.save(5)
            if rank == 1:
                raise ValueError("the user's own")
    except (CheckpointError, ValueError) as error:
        told["left"] = str(error)
    told["left in"] = time.monotonic() - began
    (out / f"told{rank}.json").write_text(json.dumps(told))
    dist.barrier()  # and the process ends, with two pushes on their way


def main() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    globals()[sys.argv[2]](Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
