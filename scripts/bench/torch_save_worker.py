"""One rank that trains with FSDP2, and saves by turns: dcp.save, dcp.async_save, ``ckpt.Saver``.

    torch_save_worker.py FOLDER PARAMETERS TURNS BUDGET

As ``save_worker.py``, whose ways are those of DeepSpeed. Rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from save_worker import ROWS, WIDTH, Bench, Cost, Poll, Way, slowest
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.fsdp import fully_shard

import ckpt

Loop = tuple[Any, torch.optim.Optimizer]


def fsdp_loop(parameters: int) -> Loop:
    """A stack of big linears in fp32 with AdamW, sharded, the same at every call."""
    torch.manual_seed(5)
    layers = max(2, round(parameters / WIDTH**2))
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


class TorchBench(Bench):
    """Turns of all ways on one training of FSDP2."""

    def train(self) -> float:
        """A step; its seconds."""
        dist.barrier()
        began = time.perf_counter()
        model, optimizer = self.engine
        generator = torch.Generator().manual_seed(100 * (self.step + 1) + dist.get_rank())
        loss = (model(torch.randn(ROWS, WIDTH, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.losses.append(loss.item())
        return time.perf_counter() - began


def with_dcp(background: bool, loop: Loop, run: Path, budget: int) -> Way:
    """torch's own save of the state dicts."""
    group = dist.new_group(backend="gloo")

    def save(step: int) -> Poll:
        of_model, of_optimizer = state_dicts.get_state_dict(*loop)
        state = {"model": of_model, "optimizer": of_optimizer}
        where: dict[str, Any] = {"checkpoint_id": run / f"step{step}", "process_group": group}
        if not background:
            dcp.save(state, **where)
            return lambda: True
        future: Any = dcp.async_save(state, **where)
        return lambda: future.done() and future.result() is not False

    return save


def ours(background: bool, loop: Loop, run: Path, budget: int) -> Way:
    """``ckpt.Saver``; ``budget`` is in bytes."""
    model, optimizer = loop
    how: dict[str, Any] = {"background": background, "memory": budget, "timeout": 60}
    saver = ckpt.Saver(model=model, optimizer=optimizer, run=run, **how)

    def save(step: int) -> Poll:
        saver.save(step)

        def is_committed() -> bool:
            saver.step(step)
            return saver.flight is None

        return is_committed

    return save


def main() -> None:
    """Take turns; compare losses; write what was measured."""
    folder = Path(sys.argv[1])
    parameters, turns, budget = map(int, sys.argv[2:5])
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    bench = TorchBench(fsdp_loop(parameters), folder / "out")
    bench.train()  # the first step makes the optimizer's state
    names = list(WAYS)
    ways = {name: WAYS[name](bench.engine, folder / "out", budget) for name in names}
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            costs[name].append(bench.turn(ways[name], not turn))
            if dist.get_rank() == 0:
                line = " ".join(f"{key} {value:.4g}" for key, value in costs[name][-1].items())
                print(f"{turn}/{turns} {name}: {line}", file=sys.stderr, flush=True)

    losses, bench.engine = bench.losses, None
    ways.clear()
    fresh = TorchBench(fsdp_loop(parameters), folder / "out")
    steps = [fresh.train() for _ in range(min(len(losses), 3 * len(names) + 1))]
    same = slowest(float(fresh.losses != losses[: fresh.step]))[0] == 0
    if dist.get_rank() == 0:
        result = {"costs": costs, "same": same, "compared": fresh.step, "step": steps}
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    with suppress(Exception):
        dist.destroy_process_group()


WAYS: dict[str, Callable[[Loop, Path, int], Way]] = {
    "dcp": partial(with_dcp, False),
    "dcp-async": partial(with_dcp, True),
    "saver": partial(ours, False),
    "saver-background": partial(ours, True),
}

if __name__ == "__main__":
    main()
