"""Measures how fast row-parallel shards are put together, beside `cat` of the same files.

    python scripts/bench/bench_tiles.py --folder /dev/shm/tiles --rows 4096 --row-bytes 7168

Each shard has the columns of one rank: a row of the tensor is a row of every shard. `cat` copies
the shards one after another, which is as many bytes with no rows to interleave. Both write into
the page cache and sync nothing; they take turns, and the median of `--runs` is shown. CRC32s are
computed, unless `--no-verify` is given.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

from converters.execute.workers import Mover
from converters.formats import safetensors
from converters.plan import Shard
from converters.storage.checksums import Ledger
from converters.tensors import DType, Extent, TensorRef, Weights

WRITE_BYTES = 256 << 10


class Output:
    """A file that pieces are written into."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes into the page cache, in pieces as ``LocalWriter`` does."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            os.pwrite(self.fd, view[start : start + WRITE_BYTES], offset + start)


def make_shards(folder: Path, count: int, nbytes: int) -> list[Path]:
    """Files of random bytes, one a rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"rank{rank}" for rank in range(count)]
    for path in paths:
        path.write_bytes(os.urandom(min(nbytes, 1 << 20)) * (nbytes // min(nbytes, 1 << 20)))
    return paths


def plan_shard(paths: list[Path], rows: int, row_bytes: int) -> tuple[Shard, float]:
    """The plan of all shards side by side, and the seconds that planning took."""
    width = row_bytes // DType.F32.itemsize
    start = time.perf_counter()
    refs = [
        TensorRef(DType.F32, (rows, width), (Extent(path, 0, rows * row_bytes),)) for path in paths
    ]
    placements = [((0, rank * width), ref) for rank, ref in enumerate(refs)]
    tensor = TensorRef.tile((rows, width * len(paths)), placements)
    plan = safetensors.plan(Weights({"weight": tensor}), None, 1 << 62, "keep")
    return plan.shards[0], time.perf_counter() - start


def seconds(work: Callable[[], None], output: Path) -> float:
    """What some work takes that writes an output anew."""
    output.unlink(missing_ok=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For the files.")
@click.option("--ranks", default=8, show_default=True)
@click.option("--rows", default=4096, show_default=True)
@click.option("--row-bytes", default=7168, show_default=True, help="Of a row in a shard.")
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--verify/--no-verify", default=True)
def main(
    folder: Path, ranks: int, rows: int, row_bytes: int, threads: int, runs: int, verify: bool
) -> None:
    """Prints GB/s of both, and their ratio."""
    paths = make_shards(folder, ranks, rows * row_bytes)
    shard, planning_seconds = plan_shard(paths, rows, row_bytes)
    output = folder / "output"

    def tile() -> None:
        Mover(verify, Ledger(), set(), lambda _: None).move(shard, Output(output), threads)

    def cat() -> None:
        with output.open("wb") as file:
            subprocess.run(["cat", *paths], stdout=file, check=True)

    times: dict[str, list[float]] = {"tiles": [], "cat": []}
    for _ in range(runs):
        times["tiles"].append(seconds(tile, output))
        times["cat"].append(seconds(cat, output))

    shutil.rmtree(folder)
    speeds = {name: shard.nbytes / median(each) / 1e9 for name, each in times.items()}
    click.echo(f"planned in {1000 * planning_seconds:.1f} ms")
    for name, speed in speeds.items():
        click.echo(f"{name:5} {speed:.2f} GB/s")
    click.echo(f"ratio {speeds['tiles'] / speeds['cat']:.2f}")


if __name__ == "__main__":
    main()
