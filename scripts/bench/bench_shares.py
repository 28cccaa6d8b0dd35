"""CPU seconds of each of several processes that make one output, and the wall time of two.

    python scripts/bench/bench_shares.py --gb 4

A Llama in stage 3 of two ranks, in the page cache. Shares are written one after another, so that
each has the machine to itself as on a node of its own: its CPU seconds are those of a node, but for
the network. Then `torchrun` runs two processes of one thread beside each other, against one process
of two threads. Prints tables in Markdown.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
from bench import PYTHON, Cost, build, ckpt, run

COUNTS = (1, 2, 4, 8)
COMMANDS = {
    "to-fp32": ["to-fp32"],
    "to-fp32 --dtype bf16": ["to-fp32", "--dtype", "bf16"],
    "reshard, 2 to 3 ranks": ["reshard", "--world-size", "3"],
}


def removed(output: Path) -> Path:
    """The path, at which nothing is any more."""
    for path in (output, output.with_name(f".{output.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    return output


def shares(words: list[str], output: Path, count: int) -> tuple[list[Cost], Cost]:
    """What each share cost, and their joining."""
    removed(output)
    if count == 1:
        return [run(ckpt(*words, "-o", output, "--workers", "1"))], Cost(0, 0, 0)
    costs = [
        run(ckpt(*words, "-o", output, "--workers", "1", "--share", f"{number}/{count}"))
        for number in range(1, count + 1)
    ]
    return costs, run(ckpt("join", output))


def together(words: list[str], output: Path) -> list[str]:
    """The command of two processes with a thread each."""
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*torchrun, "--master-port", "29641", *ckpt(*words, "-o", output, "--workers", "1")[1:]]


@click.command()
@click.option("--gb", default=4.0, show_default=True, help="GB of fp32 weights.")
@click.option("--runs", default=3, show_default=True, help="Of what is timed by the clock.")
@click.option("--source", type=click.Path(path_type=Path), help="A checkpoint that is there.")
def main(gb: float, runs: int, source: Path | None) -> None:
    """Measure and print the tables."""
    with tempfile.TemporaryDirectory(prefix="bench-shares-") as name:
        folder = Path(name)
        if source is None:
            source = folder / "checkpoint-1"
            build(source, 3, gb)
        output = folder / "out"
        click.echo("| command | processes | CPU of each, s | of all, s | joining, s | peak, MiB |")
        click.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
        for title, (command, *options) in COMMANDS.items():
            for count in COUNTS:
                costs, joining = shares([command, str(source), *options], output, count)
                cpu = [cost.cpu for cost in costs]
                peak = max(cost.peak for cost in [*costs, joining]) >> 20
                click.echo(
                    f"| `{title}` | {count} | {min(cpu):.2f} - {max(cpu):.2f} | {sum(cpu):.2f} | "
                    f"{joining.cpu:.2f} | {peak} |"
                )
        click.echo("\n| command | one process, two threads, s | torchrun, two of one thread, s |")
        click.echo("| --- | ---: | ---: |")
        for title, (command, *options) in COMMANDS.items():
            words = [command, str(source), *options]
            alone, both = [], []
            for _ in range(runs):
                alone.append(run(ckpt(*words, "-o", removed(output), "--workers", "2")).wall)
                both.append(run(together(words, removed(output))).wall)
            removed(output)
            click.echo(f"| `{title}` | {median(alone):.1f} | {median(both):.1f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
