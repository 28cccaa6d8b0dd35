"""Measures how long a save holds the training: DeepSpeed, torch's DCP and `ckpt.Saver`, by turns.

Two ranks train a stack of big linears and save it in every way in one run (``save_worker.py``).
"""

import json
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
from bench import ENVIRONMENT, FILE, FOLDER, MIB, REPOSITORY, Bar, machine, table

STOCK, DCP, DCP_ASYNC = "deepspeed", "dcp", "dcp-async"
OURS, WEIGHTS, BEHIND = "saver", "saver-bf16", "saver-background"
NAMES = {
    STOCK: "`engine.save_checkpoint`",
    DCP: "`dcp.save`",
    DCP_ASYNC: "`dcp.async_save`",
    OURS: "`saver.save`",
    WEIGHTS: '`saver.save`, `weights="bf16"`',
    BEHIND: "`saver.save`, `background=True`",
}
ABOUT = """\
How many seconds `ckpt.Saver` blocks a training, measured beside `engine.save_checkpoint` of
DeepSpeed and `torch.distributed.checkpoint` (`dcp`). This command measures again and writes this
page:

```sh no-run
{command}
```

Two gloo ranks train a stack of linears of {millions} million parameters in bf16 with AdamW under
DeepSpeed. They save it {turns} times in each way, alternating between the ways, after one more save
that is not counted. Before each save the last output was removed and the disk synced.

- *Blocked* is how long the training thread was in the save, on the slowest rank: in the call and,
  for a save in the background, in the calls that finish it. The column beside it is this time
  divided by that of `engine.save_checkpoint`.
- *Step beside* is the training step right after the call.
- *Until complete* is the time from the call until the checkpoint is complete.
- *Memory* is the peak during the first save and the step beside it, beyond the peak of a step
  without a save.

`engine.save_checkpoint` syncs nothing: it returns when the bytes are in the page cache. `dcp`
writes the same tensors and syncs them. `saver.save` syncs, digests and commits. The losses are
compared with those of a second engine that took the same steps and saved nothing.

The machine:
{machine}.

The first table compares with the targets of this project: 0.5 x means that a save blocked the
training half as long as `engine.save_checkpoint` did.
"""
Cost = dict[str, float]
Costs = dict[str, list[Cost]]
Found = dict[str, Any]


def measure(
    folder: Path, stage: int, millions: int, turns: int, budget: int, ways: list[str]
) -> Found:
    """What the ranks measured; fails with what they said."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", port, str(REPOSITORY / "scripts/bench/save_worker.py")]
    command += [str(folder), str(stage), str(millions * 10**6), str(turns), str(budget)]
    command += [",".join(ways)]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.run(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        raise click.ClickException(f"{shlex.join(command)}\n{text[-8000:]}")
    found: Found = json.loads((folder / "result.json").read_text())
    return found


def held(costs: list[Cost]) -> float:
    """The median of the seconds that a save held the training thread, without the first turn."""
    return middle(costs, "held")


def middle(costs: list[Cost], key: str) -> float:
    """The median of a measure, without the first turn."""
    return median(cost[key] for cost in costs[1:])


def memory(costs: list[Cost]) -> float:
    """Bytes that the first save took beyond what training takes."""
    return max(0.0, costs[0]["memory"])


def cost_table(costs: Costs) -> str:
    """One row for each way."""

    def row(name: str) -> tuple[str, ...]:
        each = costs[name]
        numbers = [held(each), held(each) / held(costs[STOCK])]
        numbers += [middle(each, "beside"), middle(each, "whole")]
        time, ratio, beside, whole = (f"{number:.2f}" for number in numbers)
        span = [cost["held"] for cost in each[1:]]
        spread = f"{min(span):.2f} - {max(span):.2f}"
        return NAMES[name], time, spread, ratio, beside, whole, f"{memory(each) / MIB:,.0f}"

    head = "way|blocked, s|min - max|: DeepSpeed|step beside, s|until complete, s|memory, MiB"
    return table(head, map(row, costs))


def bars(stage: int, costs: Costs, budget: int) -> Iterator[Bar]:
    """What the saver promises, against DeepSpeed's own save."""
    for name, most in (OURS, 1.05), (BEHIND, 0.25):
        if {STOCK, name} <= costs.keys():
            ratio = held(costs[name]) / held(costs[STOCK])
            what = f"stage {stage}, {NAMES[name]}: at most {most} x DeepSpeed's time"
            yield what, f"{ratio:.2f} x", ratio <= most
    if BEHIND in costs:
        used = memory(costs[BEHIND])
        what = f"stage {stage}, {NAMES[BEHIND]}: at most its budget of {budget / MIB:,.0f} MiB"
        yield what, f"{used / MIB:,.0f} MiB", used <= budget


@click.command()
@click.option("--millions", default=100, show_default=True, help="Parameters; 14 bytes each.")
@click.option("--turns", default=3, show_default=True, help="Times that each way is measured.")
@click.option("--stage", type=click.Choice(["2", "3", "both"]), default="both", show_default=True)
@click.option("--budget", default=1024, show_default=True, help="MiB of copies, in the background.")
@click.option("--only", default="", metavar="WAY,...", help=f"Of {', '.join(NAMES)}.")
@click.option("--folder", type=FOLDER, help="Where to work.")
@click.option("--markdown", type=FILE, help="Write the page there.")
@click.option("--json", "as_json", type=FILE, help="Write every single cost there.")
def main(
    millions: int,
    turns: int,
    stage: str,
    budget: int,
    only: str,
    folder: Path | None,
    markdown: Path | None,
    as_json: Path | None,
) -> None:
    """Measure how long saves hold the training, by turns, and print the page."""
    ways = [name for name in NAMES if not only or name in (STOCK, *only.split(","))]
    stages: dict[int, Found] = {}
    with tempfile.TemporaryDirectory(prefix="bench-save-", dir=folder) as name:
        for each in (2, 3) if stage == "both" else (int(stage),):
            work = Path(name) / str(each)
            work.mkdir()
            stages[each] = measure(work, each, millions, turns, budget * MIB, ways)
        where = machine(Path(name))
    page = report(stages, millions, turns, budget * MIB, where)
    click.echo(page, nl=False)
    if markdown:
        markdown.write_text(page)
    if as_json:
        as_json.write_text(json.dumps(stages, indent=1))


def report(stages: dict[int, Found], millions: int, turns: int, budget: int, where: str) -> str:
    """The page."""
    promises = [bar for each, found in stages.items() for bar in bars(each, found["costs"], budget)]
    promises += [
        (
            f"stage {each}: losses the same bits as without saves",
            f"{found['compared']} steps",
            bool(found["same"]),
        )
        for each, found in stages.items()
    ]
    rows = ((what, measured, "yes" if kept else "**no**") for what, measured, kept in promises)
    command = shlex.join(["python", "scripts/bench/bench_save.py", *sys.argv[1:]])
    about = ABOUT.format(command=command, millions=millions, turns=turns, machine=where)
    parts = [
        f"# How long a save blocks the training\n\n{about}",
        table("target|measured|met", rows),
    ]
    for each, found in stages.items():
        written = "\n".join(
            f"- {NAMES[name]}: {costs[0]['bytes'] / 1e9:.2f} GB"
            for name, costs in found["costs"].items()
        )
        step = median(found["step"])
        alone = f"A step without any save took {step:.2f} s. What each way wrote:\n\n{written}"
        parts.append(f"## ZeRO stage {each}\n\n{cost_table(found['costs'])}\n{alone}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
