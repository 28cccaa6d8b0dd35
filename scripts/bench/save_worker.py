"""One rank that trains, and saves by turns in each of several ways; started by ``bench_save.py``.

    save_worker.py FOLDER STAGE PARAMETERS TURNS BUDGET WAY[,WAY...]

A turn of a way: the save, a step while it may be written in the background, and polls until it is
done; then the output is removed and the disk synced. Times are those of the slowest rank. The first
turns warm up, and tell the memory that a way needs. Then a second engine takes the same steps and
saves nothing; its losses have to be the same bits. Rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import ckpt

WIDTH, ROWS = 2048, 4
Poll = Callable[[], bool]  # what the training thread does from time to time; True: it is done
Way = Callable[[int], Poll]
Cost = dict[str, float]
MEASURED = "held", "beside", "whole", "memory", "bytes"


def engine_of(stage: int, parameters: int) -> Any:
    """A stack of big linears in bf16 with AdamW, the same at every call."""
    torch.manual_seed(5)
    layers = max(2, round(parameters / WIDTH**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1 << 30,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train_step(engine: Any, step: int) -> float:
    """One step; its loss."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    rows = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    loss = (engine(rows).float() - 1).square().mean()
    engine.backward(loss)
    engine.step()
    return float(loss)


def stock(engine: Any, run: Path, budget: int) -> Way:
    """DeepSpeed's own save."""

    def save(step: int) -> Poll:
        engine.save_checkpoint(str(run))
        return lambda: True

    return save


def distributed(background: bool, engine: Any, run: Path, budget: int) -> Way:
    """torch.distributed.checkpoint, of the tensors that DeepSpeed would save."""
    group = dist.new_group(backend="gloo")

    def save(step: int) -> Poll:
        state = {f"rank{dist.get_rank()}.optimizer": engine.optimizer.state_dict()}
        if engine.zero_optimization_stage() < 3:
            state["model"] = engine.module.state_dict()  # the same on all ranks: one writes it
        where = {"checkpoint_id": str(run / f"step{step}"), "process_group": group}
        if not background:
            dcp.save(state, **where)
            return lambda: True
        future = dcp.async_save(state, **where)
        return lambda: future.done() and future.result() is not False

    return save


def ours(background: bool, weights: str | None, engine: Any, run: Path, budget: int) -> Way:
    """``ckpt.Saver``; ``budget`` is in bytes."""
    how: dict[str, Any] = {"background": background, "weights": weights, "memory": budget}
    saver = ckpt.Saver(engine, run, timeout=60, **how)

    def save(step: int) -> Poll:
        saver.save(step)

        def landed() -> bool:
            saver.step(step)
            return saver.flight is None

        return landed

    return save


def peak() -> int:
    """The most bytes this process has had in memory since ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    """From now on the peak is that of what follows (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def slowest(*seconds: float) -> list[float]:
    """The maximum over the ranks of each number."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def settle(folder: Path) -> None:
    """An empty folder and an idle disk, on every rank at the same time."""
    gc.collect()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)  # a saver may have made its lease again
        os.sync()
    dist.barrier()


class Bench:
    """Turns of all ways on one engine, and the losses meanwhile."""

    def __init__(self, engine: Any, folder: Path):
        self.engine, self.folder = engine, folder
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    def train(self) -> float:
        """A step; its seconds."""
        dist.barrier()
        start = time.perf_counter()
        self.losses.append(train_step(self.engine, self.step + 1))
        return time.perf_counter() - start

    def turn(self, save: Way, first: bool) -> Cost:
        """One save in one way; at the first turn, the memory that it needs beyond a step's."""
        settle(self.folder)
        usual = 0
        if first:
            forget_peak()
            self.train()
            usual = peak()
            forget_peak()
        dist.barrier()
        began = time.perf_counter()
        poll = save(self.step)
        done = poll()
        held = whole = time.perf_counter() - began
        beside = self.train()
        polled = 0.0
        while not done:
            time.sleep(0.02)
            start = time.perf_counter()
            done = poll()
            whole = time.perf_counter() - began
            polled += time.perf_counter() - start
        most = slowest(held + polled, beside, whole, peak() - usual)
        nbytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return dict(zip(MEASURED, [*most, float(nbytes)], strict=True))


def main() -> None:
    """Take turns; compare losses; write what was measured."""
    folder, names = Path(sys.argv[1]), sys.argv[6].split(",")
    stage, parameters, turns, budget = map(int, sys.argv[2:6])
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=5))
    bench = Bench(engine_of(stage, parameters), folder / "out")
    bench.train()  # the first step makes the optimizer's state
    ways = {name: WAYS[name](bench.engine, folder / "out", budget) for name in names}
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            costs[name].append(bench.turn(ways[name], not turn))
            if dist.get_rank() == 0:
                line = " ".join(f"{key} {value:.4g}" for key, value in costs[name][-1].items())
                print(f"{turn}/{turns} {name}: {line}", file=sys.stderr, flush=True)
    saved, bench.engine = bench.losses, None
    ways.clear()
    gc.collect()
    fresh = Bench(engine_of(stage, parameters), folder / "out")
    alone = [fresh.train() for _ in range(min(len(saved), 3 * len(names) + 1))]
    same = slowest(float(fresh.losses != saved[: fresh.step]))[0] == 0
    if dist.get_rank() == 0:
        found = {"costs": costs, "same": same, "compared": fresh.step, "step": alone}
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    with suppress(Exception):
        dist.destroy_process_group()


WAYS: dict[str, Callable[[Any, Path, int], Way]] = {
    "deepspeed": stock,
    "dcp": partial(distributed, False),
    "dcp-async": partial(distributed, True),
    "saver": partial(ours, False, None),
    "saver-bf16": partial(ours, False, "bf16"),
    "saver-background": partial(ours, True, None),
}

if __name__ == "__main__":
    main()
