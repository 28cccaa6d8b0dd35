"""Measures `ckpt stats` and `ckpt diff` beside `cat` of the same bytes: seconds and memory.

    python scripts/bench/bench_inspection.py --folder /dev/shm/inspection --size 1.4

Two files of random weights are made and read once, so that they lie in the page cache. The
commands take turns, and the least of `--runs` is shown: another process only ever makes one slower.
Seconds and memory are those of the whole process, its start and its imports included. CPU seconds
are of all threads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

ROWS, COLUMNS = 1024, 3584  # of a tensor


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def make_file(path: Path, nbytes: int, dtype: str, seed: int) -> None:
    """A file of normally distributed weights."""
    generator = np.random.default_rng(seed)
    numpy_type = np.dtype(np.float32 if dtype == "fp32" else bfloat16)
    count = max(1, nbytes // (ROWS * COLUMNS * numpy_type.itemsize))
    tensors = {
        f"layers.{index}.weight": generator.standard_normal((ROWS, COLUMNS), np.float32).astype(
            numpy_type
        )
        for index in range(count)
    }
    save_file(tensors, path)


def usage(command: list[str]) -> Usage:
    """Runs a command, whose output nobody reads."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, resources = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise click.ClickException(f"{command} ended with {process.returncode}")
    cpu_seconds = resources.ru_utime + resources.ru_stime
    return Usage(seconds, cpu_seconds, resources.ru_maxrss * 1024)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--size", type=float, default=1.4, help="GB of each file.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32")
@click.option("--runs", type=int, default=5)
def main(folder: Path, size: float, dtype: str, runs: int) -> None:
    """Makes the files, measures, and removes them."""
    folder.mkdir(parents=True)
    try:
        paths = [folder / f"{name}.safetensors" for name in "ab"]
        for seed, path in enumerate(paths):  # in processes of their own: memory is inherited
            arguments = (path, int(size * 1e9), dtype, seed)
            process = get_context("spawn").Process(target=make_file, args=arguments)
            process.start()
            process.join()

        first, second = map(str, paths)
        ckpt = [sys.executable, "-m", "ckpt"]
        commands = {
            "cat A": ["cat", first],
            "ckpt stats A": [*ckpt, "stats", first],
            "ckpt stats A --histogram": [*ckpt, "stats", first, "--histogram"],
            "cat A B": ["cat", first, second],
            "ckpt diff A A --exact": [*ckpt, "diff", first, first, "--exact"],
            "ckpt diff A B": [*ckpt, "diff", first, second],
        }
        usages: dict[str, list[Usage]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                usages[name].append(usage(command))

        total = sum(path.stat().st_size for path in paths) / 1e9
        print(f"{total:.2f} GB in two files of {dtype}, least of {runs} runs")
        for name, each in usages.items():
            seconds = min(one.seconds for one in each)
            cpu_seconds = min(one.cpu_seconds for one in each)
            peak = max(one.peak_bytes for one in each) / 2**20
            print(f"{name:26} {seconds:6.2f} s  {cpu_seconds:6.2f} s of CPU  {peak:6.1f} MiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
