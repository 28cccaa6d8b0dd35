"""Measures `ckpt to-dcp` and `from-dcp` beside `cp` and `sync` of the same bytes.

The commands take turns, each in a fresh process, with the checkpoint in the page cache; before
each run the last output is removed and the disk synced (bench.py). Nothing else turns a ZeRO
checkpoint into one of torch's, or back.
"""

import tempfile
from pathlib import Path
from statistics import median

import click
from bench import CP_SYNC, MIB, Commands, Costs, build, ckpt, run, shell, take_turns
from bench_reshard import files_made, shown, table

TO, FROM = "ckpt to-dcp", "ckpt from-dcp"


def competitors(source: Path, dcp: Path, world: int, stage: int, to: Path) -> Commands:
    """Every command to time."""
    back = ("--world-size", str(world), "--stage", str(stage))
    return {
        TO: ckpt("to-dcp", source, "-o", to),
        FROM: ckpt("from-dcp", dcp, *back, "-o", to),
        CP_SYNC: shell('cp -r "$1" "$2"; sync -f "$2"', dcp, to),
    }


def report(costs: Costs, made: dict[str, tuple[int, int]]) -> str:
    """The table, and the bars."""
    walls = {name: median(cost.wall for cost in held) for name, held in costs.items()}
    peaks = {name: max(cost.peak for cost in held) for name, held in costs.items()}
    to, back = (walls[name] / walls[CP_SYNC] for name in (TO, FROM))
    bars = [
        ("to DCP: at most 1.2 times cp and sync of it", to, to <= 1.2),
        ("back: at most 1.2 times", back, back <= 1.2),
        ("at most 64 MiB", max(peaks[TO], peaks[FROM]) / MIB, peaks[TO] <= 64 * MIB),
    ]
    return "\n".join([*table(costs, made), "", *shown(bars)])


@click.command()
@click.option("--stage", type=click.IntRange(2, 3), default=3, show_default=True)
@click.option("--gb", default=0.6, show_default=True, help="GB of fp32 weights.")
@click.option("--world-size", default=3, show_default=True, help="Of from-dcp.")
@click.option("--runs", default=3, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work. Default: a new one."
)
def main(stage: int, gb: float, world_size: int, runs: int, folder: Path | None) -> None:
    """Make a checkpoint, take turns, print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, dcp, to = (Path(work) / name for name in ("source", "dcp", "to"))
        build(source, stage, gb)
        run(ckpt("to-dcp", source, "-o", dcp))
        commands = competitors(source, dcp, world_size, stage, to)
        costs = take_turns(commands, runs, source, to)
        made = {name: files_made(commands[name], to) for name in commands}
        size = sum(path.stat().st_size for path in dcp.rglob("*") if path.is_file())
    click.echo(f"stage {stage}, 2 ranks, {size / 1e9:.2f} GB as DCP, {runs} runs\n")
    click.echo(report(costs, made))


if __name__ == "__main__":
    main()
