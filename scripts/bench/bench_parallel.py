"""Measures tensor parallelism: conversion beside that of ZeRO alone, `ckpt reshard` beside cp.

One model is written three times: of ZeRO alone on 2 ranks, of tensor parallelism 8 x 2 and 4 x 1,
by `ckpt reshard --tp`. The commands take turns as in bench.py.

    python scripts/bench/bench_parallel.py --gb 1.4 --runs 3
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
from bench import CP_SYNC, MIB, Commands, Costs, build, ckpt, run, shell, take_turns
from bench_reshard import shown, table

DENSE, PARALLEL = "ckpt to-fp32, ZeRO alone", "ckpt to-fp32, tensor parallel 8 x 2"
RESHARD = "ckpt reshard, tensor parallel 4 to 2"
RULES = {
    r".*(embed_tokens|lm_head|[qkv]_proj|gate_proj|up_proj)\.weight": "dim 0",
    r".*(o_proj|down_proj)\.weight": "dim 1",
    r".*norm\.weight": "replicated",
}
MAX_TIMES = 1.5
MAX_MIB = 64


def sources(work: Path, gb: float) -> dict[str, Path]:
    """The checkpoints by their tensor-parallel ranks; 1 is that of ZeRO alone."""
    folders = {"1": work / "zero", "8": work / "tp8", "4": work / "tp4"}
    rules = work / "rules.json"
    rules.write_text(json.dumps(RULES))
    build(folders["1"], 2, gb)
    _divide_heads(folders["1"])
    for degree, ranks in (("8", 16), ("4", 4)):
        options = ("--tp", degree, "--tp-rules", str(rules), "--world-size", str(ranks))
        run(ckpt("reshard", folders["1"], *options, "-o", folders[degree]))
    return folders


def _divide_heads(folder: Path) -> None:
    """Gives the model a number of heads that tensor-parallel ranks can share."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"num_attention_heads": 16}))


def conversions(folders: dict[str, Path], to: Path) -> Commands:
    """Both conversions."""
    return {
        DENSE: ckpt("to-fp32", folders["1"], "-o", to),
        PARALLEL: ckpt("to-fp32", folders["8"], "-o", to),
    }


def rewritings(source: Path, to: Path) -> Commands:
    """The rewriting, and the copy of what it reads."""
    return {
        RESHARD: ckpt("reshard", source, "--tp", "2", "--world-size", "4", "-o", to),
        CP_SYNC: shell('cp -r "$1" "$2"; sync -f "$2"', source, to),
    }


def bars(costs: Costs) -> Iterator[tuple[str, float, bool]]:
    """What is promised, what was measured, and whether it held."""
    walls = {name: median(cost.wall for cost in held) for name, held in costs.items()}
    for name, other in ((PARALLEL, DENSE), (RESHARD, CP_SYNC)):
        times = walls[name] / walls[other]
        yield f"{name}: at most {MAX_TIMES} times {other}", times, times <= MAX_TIMES
    peak = max(cost.peak for cost in costs[PARALLEL]) / MIB
    yield f"{PARALLEL}: at most {MAX_MIB} MiB", peak, peak <= MAX_MIB


@click.command()
@click.option("--gb", default=1.4, show_default=True, help="GB of fp32 weights.")
@click.option("--runs", default=3, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work; takes 50 GB for --gb 1.4."
)
def main(gb: float, runs: int, folder: Path | None) -> None:
    """Make the checkpoints, take turns, print a table."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name:
        work = Path(name)
        folders, to = sources(work, gb), work / "to"
        costs = take_turns(conversions(folders, to), runs, folders["8"], to)
        costs |= take_turns(rewritings(folders["4"], to), runs, folders["4"], to)
    click.echo("\n".join([*table(costs, {}), "", *shown(list(bars(costs)))]))


if __name__ == "__main__":
    main()
