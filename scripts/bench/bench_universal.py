"""Measures `ckpt to-universal` and `from-universal` beside DeepSpeed's ds_to_universal.py and cp.

The competitors take turns, each in a fresh process, with the checkpoint in the page cache; before
each run the last output is removed and the disk synced (bench.py). ds_to_universal is measured with
one worker, which takes the least memory, and with its defaults; the peak of the latter is that of
its largest process. There is no counterpart of from-universal in DeepSpeed: load_universal reads a
universal folder in every rank.
"""

import tempfile
from pathlib import Path
from statistics import median

import click
from bench import CP_SYNC, MIB, Commands, Costs, build, ckpt, run, shell, take_turns
from bench_reshard import ONE_WORKER, deepspeeds, files_made, shown, table

TO, READ_BACK, FROM = "ckpt to-universal", "ckpt to-universal --read-back", "ckpt from-universal"
ONE, DEFAULT = "ds_to_universal, one worker", "ds_to_universal, default workers"


def competitors(source: Path, universal: Path, world: int, to: Path) -> Commands:
    """Every command to time."""
    ours = ckpt("to-universal", source, "-o", to)
    theirs = deepspeeds(source, to)
    return {
        TO: ours,
        READ_BACK: [*ours, "--read-back"],
        FROM: ckpt("from-universal", universal, "--world-size", str(world), "-o", to),
        CP_SYNC: shell('cp -r "$1" "$2"; sync -f "$2"', source, to),
        ONE: [*theirs, *ONE_WORKER],
        DEFAULT: theirs,
    }


def report(costs: Costs, made: dict[str, tuple[int, int]]) -> str:
    """The table, and the bars."""
    walls = {name: median(cost.wall for cost in held) for name, held in costs.items()}
    peaks = {name: max(cost.peak for cost in held) for name, held in costs.items()}
    faster, less = walls[ONE] / walls[TO], peaks[TO] / peaks[ONE]
    bars = [
        ("at least 10 times as fast as ds_to_universal", faster, faster >= 10),
        ("at most a tenth of its memory", less, less <= 0.1),
        ("as fast as its defaults, times", walls[DEFAULT] / walls[TO], walls[DEFAULT] >= walls[TO]),
        ("at most 256 MiB", peaks[TO] / MIB, max(peaks[TO], peaks[FROM]) <= 256 * MIB),
    ]
    return "\n".join([*table(costs, made), "", *shown(bars)])


@click.command()
@click.option("--stage", type=click.IntRange(2, 3), default=2, show_default=True)
@click.option("--gb", default=0.6, show_default=True, help="GB of fp32 weights.")
@click.option("--world-size", default=3, show_default=True, help="Of from-universal.")
@click.option("--runs", default=3, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work. Default: a new one."
)
def main(stage: int, gb: float, world_size: int, runs: int, folder: Path | None) -> None:
    """Make a checkpoint, take turns, print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, universal, to = (Path(work) / name for name in ("source", "universal", "to"))
        build(source, stage, gb)
        run(ckpt("to-universal", source, "-o", universal))
        commands = competitors(source, universal, world_size, to)
        costs = take_turns(commands, runs, source, to)
        made = {name: files_made(commands[name], to) for name in (TO, FROM, ONE)}
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    click.echo(f"stage {stage}, 2 ranks, {size / 1e9:.2f} GB, {runs} runs\n")
    click.echo(report(costs, made))


if __name__ == "__main__":
    main()
