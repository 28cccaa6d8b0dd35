"""Measures `ckpt reshard` beside cp and DeepSpeed's ds_to_universal.py, on one checkpoint.

The competitors take turns, each in a fresh process, with the checkpoint in the page cache; before
each run the last output is removed and the disk synced (bench.py). ds_to_universal is measured
alone: what load_universal takes on every rank comes on top, while what ckpt writes is loaded as any
checkpoint is.

    python scripts/bench/bench_reshard.py --stage 3 --gb 4 --only "^cp"   12 GB, without DeepSpeed
"""

import tempfile
from pathlib import Path
from statistics import median

import click
from bench import (
    CP,
    CP_SYNC,
    MIB,
    PYTHON,
    Commands,
    Costs,
    build,
    ckpt,
    matching,
    run,
    shell,
    take_turns,
)

RESHARD, READ_BACK = "ckpt reshard", "ckpt reshard --read-back"
ACROSS, UNIVERSAL = "ckpt reshard --stage (the other)", "ds_to_universal"
ONE_WORKER = ["--num_extract_workers", "1", "--num_merge_workers", "1"]


def competitors(source: Path, stage: int, world: int, to: Path) -> Commands:
    """Every command to time."""
    ours = ckpt("reshard", source, "--world-size", str(world), "-o", to)
    return {
        RESHARD: ours,
        READ_BACK: [*ours, "--read-back"],
        ACROSS: [*ours, "--stage", str(5 - stage)],
        CP: ["cp", "-r", str(source), str(to)],
        CP_SYNC: shell('cp -r "$1" "$2"; sync -f "$2"', source, to),
        UNIVERSAL: [*deepspeeds(source, to), *ONE_WORKER],
    }


def deepspeeds(source: Path, to: Path) -> list[str]:
    """DeepSpeed's converter, with the option that checkpoints of the Trainer need."""
    command = [PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    return [*command, "--input_folder", str(source / "global_step2"), "--output_folder", str(to)]


def files_made(command: list[str], to: Path) -> tuple[int, int]:
    """The files that one more run leaves, and their bytes."""
    run(shell('rm -rf "$1"', to))
    run(command)
    sizes = [path.stat().st_size for path in to.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def table(costs: Costs, made: dict[str, tuple[int, int]]) -> list[str]:
    """A row for each command."""
    lines = [
        "| command | wall | fastest | CPU | peak memory | files | GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, held in costs.items():
        wall, cpu = median(cost.wall for cost in held), median(cost.cpu for cost in held)
        fastest, peak = min(cost.wall for cost in held), max(cost.peak for cost in held)
        files, size = made.get(name, ("", 0))
        lines.append(
            f"| {name} | {wall:.2f} s | {fastest:.2f} s | {cpu:.2f} s "
            f"| {peak / MIB:.0f} MiB | {files} | {f'{size / 1e9:.2f}' if size else ''} |"
        )
    return lines


def report(costs: Costs, made: dict[str, tuple[int, int]]) -> str:
    """The table, and the bars of the commands that ran."""
    walls = {name: median(cost.wall for cost in held) for name, held in costs.items()}
    peaks = {name: max(cost.peak for cost in held) for name, held in costs.items()}
    ours, peak = walls[RESHARD], peaks[RESHARD]
    bars = [("at most 256 MiB", peak / MIB, peak <= 256 * MIB)]
    for name, what in ((CP, "cp, which syncs nothing"), (CP_SYNC, "cp, then sync")):
        if name in walls:
            times = ours / walls[name]
            bars.append((f"at most 1.2 times {what}", times, times <= 1.2))
    if UNIVERSAL in walls:
        faster, theirs = walls[UNIVERSAL] / ours, peaks[UNIVERSAL]
        bars.append(("at least 10 times as fast as ds_to_universal", faster, faster >= 10))
        bars.append(("at most a tenth of its memory", peak / theirs, 10 * peak <= theirs))
    return "\n".join([*table(costs, made), "", *shown(bars)])


def shown(bars: list[tuple[str, float, bool]]) -> list[str]:
    """A line for each bar: what was promised, what was measured, and whether it held."""
    return [f"- {what}: {found:.2f}, {'held' if met else 'MISSED'}" for what, found, met in bars]


@click.command()
@click.option("--stage", type=click.IntRange(2, 3), default=2, show_default=True)
@click.option("--gb", default=0.6, show_default=True, help="GB of fp32 weights.")
@click.option("--world-size", default=3, show_default=True, help="The target; the source has 2.")
@click.option("--runs", default=3, show_default=True)
@click.option("--only", default="", metavar="REGEX", help=f"Beside {RESHARD}, what matches.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work. Default: a new one."
)
def main(stage: int, gb: float, world_size: int, runs: int, only: str, folder: Path | None) -> None:
    """Make a checkpoint, take turns, print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, to = Path(work) / "source", Path(work) / "to"
        build(source, stage, gb)
        commands = competitors(source, stage, world_size, to)
        commands = matching(commands, f"^{RESHARD}$|{only}")
        costs = take_turns(commands, runs, source, to)
        made = {
            name: files_made(commands[name], to) for name in commands.keys() & {RESHARD, UNIVERSAL}
        }
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    click.echo(f"stage {stage}, 2 ranks to {world_size}, {size / 1e9:.2f} GB, {runs} runs\n")
    click.echo(report(costs, made))


if __name__ == "__main__":
    main()
