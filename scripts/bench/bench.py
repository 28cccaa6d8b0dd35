"""Measures `ckpt` beside cp and DeepSpeed's zero_to_fp32, and writes docs/performance.md.

The competitors take turns, each in a fresh process, on one checkpoint in the page cache. Before
each run the last output is removed and the disk synced. CPU time and peak memory are what the
kernel says of a process when it ends (os.wait4). A process's peak starts at its parent's size, so
this one stays small: it imports neither torch nor ckpt, and marks what may be its own size with <.
"""

import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
PYTHON = sys.executable
MIB = 1 << 20
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
TERABYTE = 333  # GB of fp32 weights that make a checkpoint of 1 TB

FP32, UNVERIFIED = "ckpt to-fp32", "ckpt to-fp32 --no-verify"
BF16, FP16 = "ckpt to-fp32 --dtype bf16", "ckpt to-fp32 --dtype fp16 --allow-overflow"
CP, CP_SYNC, FLOOR = "cp", "cp, then sync", "2-thread copy with fsync"
Z2F, Z2F_SAFE = "zero_to_fp32", "zero_to_fp32 --safe_serialization"
HELP, SHOW = "ckpt --help", "ckpt show, 1 TB in 64 ranks"
Z2F_BF16 = "zero_to_fp32's function, dtype=bf16"

DEEPSPEED_BF16 = """import sys; from deepspeed.utils.zero_to_fp32 import *
convert_zero_checkpoint_to_state_dict(*sys.argv[1:], dtype="bf16", safe_serialization=True)"""
SAME = " `ckpt` and\n`zero_to_fp32 --safe_serialization` wrote the same bits."
ABOUT = """\
How long `ckpt to-fp32` takes and how much memory it needs, measured beside `cp` and DeepSpeed's
`zero_to_fp32`. This command measures again and writes this page:

```sh no-run
{command}
```

The checkpoint is a Llama of {gb} GB of fp32 weights, saved in bf16 by two ranks: 12 bytes a
parameter in the optimizer files. Every command ran {runs} times, alternating with the others, with
the checkpoint in the page cache. Before each run the last output was removed and the disk synced.
Wall and CPU times are medians; memory is the highest peak of any run. The copies copy a file as
large as the fp32 weights. `ckpt` verifies what it reads and syncs what it writes; `cp` and
`zero_to_fp32` do neither.{same}

The machine:
{machine}.

The first table compares with the targets of this project. For "as fast as" a larger number is
better: 5 x means a fifth of the time of `zero_to_fp32` with its defaults; "its fastest way" is the
fastest of its three ways in the tables below. For `cp` a smaller number is better: 1.5 x means one
and a half times the time of `cp`. In the other tables the last column is a command's wall time
divided by that of `ckpt to-fp32`.
"""


class Cost(NamedTuple):
    """What one process took: seconds, seconds of user and system CPU, bytes at its peak."""

    wall: float
    cpu: float
    peak: int


Bar = tuple[str, str, bool]  # what is promised, what was measured, whether it held
Costs = dict[str, list[Cost]]
Commands = dict[str, list[str]]


def run(command: list[str]) -> Cost:
    """Run a program to its end; if it fails, stop with what it said."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise click.ClickException(f"{shlex.join(command)}\n{said.read().decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def ckpt(*arguments: str | Path) -> list[str]:
    """The command line of `ckpt`."""
    return [PYTHON, "-m", "ckpt", *map(str, arguments)]


def shell(script: str, *arguments: str | Path) -> list[str]:
    """The command line of a shell script with $1, $2 ..."""
    return ["sh", "-ec", script, "sh", *map(str, arguments)]


def competitors(checkpoint: Path, twin: Path, to: Path) -> Commands:
    """Every command to time. The copies copy twin, a file as large as the fp32 weights."""
    z2f = [PYTHON, "-m", "deepspeed.utils.zero_to_fp32", str(checkpoint), str(to)]
    ours = ckpt("to-fp32", checkpoint, "-o", to)
    return {
        FP32: ours,
        UNVERIFIED: [*ours, "--no-verify"],
        BF16: [*ours, "--dtype", "bf16"],
        FP16: [*ours, "--dtype", "fp16", "--allow-overflow"],
        CP: ["cp", str(twin), str(to)],
        CP_SYNC: shell('cp "$1" "$2"; sync "$2"', twin, to),
        FLOOR: [PYTHON, str(SCRIPTS / "bench/copy_floor.py"), str(twin), str(to)],
        Z2F: z2f,
        Z2F_SAFE: [*z2f, "--safe_serialization"],
        Z2F_BF16: [PYTHON, "-c", DEEPSPEED_BF16, str(checkpoint), str(to)],
    }


def matching(commands: Commands, only: str) -> Commands:
    """The commands whose names the regular expression finds."""
    return {name: line for name, line in commands.items() if re.search(only, name)}


def build(folder: Path, stage: int, gb: float, *options: str) -> int:
    """Make a checkpoint; return its number of weights."""
    command = [PYTHON, str(SCRIPTS / "fixtures/big_checkpoint.py"), str(folder), *options]
    command += ["--stage", str(stage), "--gb", str(gb)]
    made = subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
    return int(made.stdout.split()[-1])


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one, and wait for the disk."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def take_turns(commands: Commands, runs: int, checkpoint: Path, to: Path) -> Costs:
    """Time every command once a round; each round starts with another one."""
    costs: Costs = {name: [] for name in commands}
    names = list(commands)
    for turn in range(runs):
        run(shell('cat "$1"/*/*.pt > /dev/null', checkpoint))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            remove(to)
            costs[name].append(run(commands[name]))
            click.echo(f"{turn + 1}/{runs}  {costs[name][-1].wall:7.2f} s  {name}", err=True)
    remove(to)
    return costs


def measure_stage(folder: Path, stage: int, gb: float, runs: int, only: str) -> Costs:
    """The costs of all competitors on one checkpoint, and of FP32 on one a quarter as large."""
    checkpoint, twin, to, theirs = (folder / name for name in ("zero", "twin", "to", "theirs"))
    commands = matching(competitors(checkpoint, twin, to), only)
    if not commands:
        return {}
    weights = build(checkpoint, stage, gb)
    run(shell('head -c "$1" /dev/urandom > "$2"', str(4 * weights), twin))
    if {FP32, Z2F_SAFE} <= commands.keys():  # what the page says under SAME
        run(commands[FP32])
        run(competitors(checkpoint, twin, theirs)[Z2F_SAFE])
        run([PYTHON, str(SCRIPTS / "bench/same_tensors.py"), str(to), str(theirs)])
        remove(theirs)
    costs = take_turns(commands, runs, checkpoint, to)
    remove(checkpoint)
    if FP32 in commands:
        build(checkpoint, stage, gb / 4)
        small = {f"{FP32}, a quarter of the size": commands[FP32]}
        costs |= take_turns(small, runs, checkpoint, to)
        remove(checkpoint)
    remove(twin)
    return costs


def measure_small(folder: Path, only: str) -> Costs:
    """The costs of the commands that should feel instant."""
    checkpoint = folder / "terabyte"
    commands = matching({HELP: ckpt("--help"), SHOW: ckpt("show", checkpoint)}, only)
    if SHOW in commands:
        build(checkpoint, 3, TERABYTE, "--world-size", "64", "--sparse")
    costs = {name: [run(line) for _ in range(10)] for name, line in commands.items()}
    remove(checkpoint)
    return costs


def wall(costs: list[Cost]) -> float:
    """The median wall time."""
    return median(cost.wall for cost in costs)


def stage_bars(stage: int, costs: Costs) -> Iterator[Bar]:
    """The bars for one checkpoint. The plain zero_to_fp32 is judged by; its best way is shown."""
    if not {FP32, BF16, FP16, CP, CP_SYNC, Z2F, Z2F_SAFE, Z2F_BF16} <= costs.keys():
        return
    best = min(wall(costs[name]) for name in (Z2F, Z2F_SAFE, Z2F_BF16))
    for name, mib, times in (FP32, 64, 5), (BF16, 96, 3), (FP16, 96, 3):
        peak = max(cost.peak for cost in costs[name]) / MIB
        faster, than_best = (each / wall(costs[name]) for each in (wall(costs[Z2F]), best))
        what = f"stage {stage}, `{name}`"
        yield (f"{what}: peak at most {mib} MiB", f"{peak:.0f} MiB", peak <= mib)
        measured = f"{faster:.1f} x (its fastest way: {than_best:.1f} x)"
        yield (f"{what}: {times} x as fast as `{Z2F}`", measured, faster >= times)
    ratio, synced = (wall(costs[FP32]) / wall(costs[name]) for name in (CP, CP_SYNC))
    measured = f"{ratio:.2f} x (of cp and sync: {synced:.2f} x)"
    yield (f"stage {stage}, `{FP32}`: takes no longer than `cp`", measured, ratio <= 1)


def small_bars(costs: Costs) -> Iterator[Bar]:
    """The bars for the commands that should feel instant."""
    for name, limit in (HELP, 150), (SHOW, 1000):
        if name in costs:
            took = wall(costs[name]) * 1000
            yield (f"`{name}`: under {limit} ms", f"{took:.0f} ms", took < limit)


def table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table; the first column is text and the others are numbers."""
    lines = [head.split("|"), ["---", *["---:"] * head.count("|")], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cost_table(costs: Costs) -> str:
    """Medians, the range of wall times, the highest peak, and wall times as shares of FP32's."""

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def row(name: str) -> tuple[str, ...]:
        walls, cpus, peaks = zip(*costs[name], strict=True)
        peak = f"{'< ' * (max(peaks) <= own)}{max(peaks) / MIB:,.0f}"
        ours = f"{wall(costs[name]) / wall(costs[FP32]):.2f}" if FP32 in costs else ""
        spread = f"{min(walls):.2f} - {max(walls):.2f}"
        return f"`{name}`", f"{median(walls):.2f}", spread, f"{median(cpus):.2f}", peak, ours

    head = f"command|wall, s|min - max|CPU, s|peak, MiB|wall : {FP32}"
    return table(head, map(row, costs))


def machine(folder: Path) -> str:
    """What was measured on."""
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    disk = subprocess.check_output(["findmnt", "-nro", "FSTYPE", "-T", folder], text=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu[0] if cpu else platform.machine()}), "
        f"{memory:.0f} GiB of memory, {disk.strip()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {packages}"
    )


def report(about: str, tables: dict[str, Costs], bars: list[Bar]) -> str:
    """The page."""
    rows = ((promise, measured, "yes" if held else "**no**") for promise, measured, held in bars)
    parts = [f"# Performance\n\n{about}", table("target|measured|met", rows)]
    parts += [f"## {title}\n\n{cost_table(costs)}" for title, costs in tables.items() if costs]
    return "\n".join(parts)


@click.command()
@click.option("--gb", default=1.4, show_default=True, help="GB of fp32 weights, near enough.")
@click.option("--runs", default=5, show_default=True, help="Times that each command is run.")
@click.option("--stage", type=click.Choice(["2", "3", "both"]), default="both", show_default=True)
@click.option("--only", default="", metavar="REGEX", help="Run only the commands that match.")
@click.option("--folder", type=FOLDER, help="Where to work; takes 6 bytes for each of --gb.")
@click.option("--markdown", type=FILE, help="Write the page there, such as docs/performance.md.")
@click.option("--json", "as_json", type=FILE, help="Write every single cost there.")
def main(
    gb: float,
    runs: int,
    stage: str,
    only: str,
    folder: Path | None,
    markdown: Path | None,
    as_json: Path | None,
) -> None:
    """Measure ckpt, cp and zero_to_fp32 alternating, and print the page."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name:
        work = Path(name)
        chosen = (2, 3) if stage == "both" else (int(stage),)
        stages = {each: measure_stage(work, each, gb, runs, only) for each in chosen}
        small = measure_small(work, only)
        where = machine(work)
    bars = [bar for each, costs in stages.items() for bar in stage_bars(each, costs)]
    command = shlex.join(["python", "scripts/bench/bench.py", *sys.argv[1:]])
    same = SAME if bars else ""
    about = ABOUT.format(command=command, gb=gb, runs=runs, same=same, machine=where)
    tables = {f"ZeRO stage {each}": costs for each, costs in stages.items()}
    tables["Small commands"] = small
    page = report(about, tables, [*bars, *small_bars(small)])
    click.echo(page, nl=False)
    if markdown:
        markdown.write_text(page)
    if as_json:
        as_json.write_text(json.dumps({"fields": Cost._fields, "costs": tables}, indent=1))


if __name__ == "__main__":
    main()
