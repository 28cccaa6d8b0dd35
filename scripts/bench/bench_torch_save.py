"""Measures how long a save holds an FSDP2 training: torch's DCP and `ckpt.Saver`, by turns.

Two gloo ranks train a stack of linears in fp32 with AdamW, and save it in every way in one run
(``torch_save_worker.py``). The bars: the training waits for a save in the background at most half
as long as for `dcp.async_save`, and a save is whole no later than `dcp.save` plus 10 %.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
from bench import ENVIRONMENT, MIB, REPOSITORY, table
from bench_save import Cost, held, memory, middle

NAMES = {
    "dcp": "`dcp.save`",
    "dcp-async": "`dcp.async_save`",
    "saver": "`saver.save`",
    "saver-background": "`saver.save`, `background=True`",
}


def least(costs: list[Cost], key: str) -> float:
    """The least of a measure, without the first turn: the other turns may have had company."""
    return min(cost[key] for cost in costs[1:])


def measure(folder: Path, millions: int, turns: int, budget: int) -> dict[str, Any]:
    """What the ranks measured; fails with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(REPOSITORY / "scripts/bench/torch_save_worker.py"), str(folder)]
    command += [str(millions * 10**6), str(turns), str(budget)]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        raise click.ClickException(f"{shlex.join(command)}\n{process.stderr[-8000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@click.command()
@click.option("--millions", default=150, show_default=True, help="Parameters, in millions.")
@click.option("--turns", default=5, show_default=True, help="Saves in each way that count.")
@click.option("--memory", "budget", default=4 << 30, show_default=True, help="Of copies, bytes.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where to save.")
def main(millions: int, turns: int, budget: int, folder: Path | None) -> None:
    """Measure, print a table, and exit 1 if a bar is not met."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        result = measure(Path(work), millions, turns, budget)

    costs = result["costs"]
    rows = [
        (
            NAMES[name],
            f"{held(each):.3f} ({least(each, 'held'):.3f})",
            f"{middle(each, 'beside'):.3f}",
            f"{middle(each, 'whole'):.3f} ({least(each, 'whole'):.3f})",
            f"{memory(each) / MIB:,.0f}",
        )
        for name, each in costs.items()
    ]
    head = "way|training waits, s (least)|step beside, s|until whole, s (least)|memory, MiB"
    click.echo(table(head, iter(rows)))
    waits, whole = "training waits", "until whole"
    bars = (
        (waits, "saver-background", "dcp-async", held, 0.5),
        (whole, "saver", "dcp", partial(middle, key="whole"), 1.1),
        (whole, "saver-background", "dcp-async", partial(middle, key="whole"), 1.1),
    )
    is_met = bool(result["same"])
    for what, own, torchs, measured, limit in bars:
        ratio = measured(costs[own]) / measured(costs[torchs])
        key = "held" if measured is held else "whole"
        of_least = least(costs[own], key) / least(costs[torchs], key)
        is_met &= ratio <= limit
        click.echo(
            f"{what}: {NAMES[own]} {ratio:.2f} x of {NAMES[torchs]} (at most {limit} x), "
            f"{of_least:.2f} x by the least of each"
        )
    click.echo(f"losses as without saves: {result['same']} ({result['compared']} steps)")
    raise SystemExit(not is_met)


if __name__ == "__main__":
    main()
