"""Measures `ckpt push` of a ZeRO-3 checkpoint beside `upload_folder` of files already converted.

By turns, each to a local Hub of its own (tests/support/hub_server) that holds nothing yet, each in
a fresh process: seconds, peak memory, and the disk that the client took at its most, which is all
that lies in its home, cache and temporary folders. `upload_folder` neither converts nor proves what
it reads.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
from bench import FILE, FOLDER, MIB, PYTHON, REPOSITORY, Bar, build, ckpt, machine, table

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/support")]
from hub_server import hub  # noqa: E402

SLOWER, MEMORY, DISK = 1.15, 256 * MIB, 50_000_000  # the bars
REPO = "org/model"
UPLOAD = """import sys; from huggingface_hub import HfApi; api = HfApi()
api.create_repo(sys.argv[2], private=True)
api.upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])"""
ABOUT = """\
    {command}

A Llama of {gb} GB of fp32 weights in the ZeRO-3 files of two ranks, pushed {runs} times in each way
to a Hub on the same machine, by turns, with what is read in the page cache. Seconds are medians;
memory and disk are the highest of any run. The Hub's work takes its share of the same cores.

{machine}.
"""


class Cost(NamedTuple):
    """What one push took: seconds, bytes of memory and of disk at the peak."""

    wall: float
    peak: int
    disk: int


def ways(checkpoint: Path, converted: Path, stage: Path) -> dict[str, tuple[list[str], bool]]:
    """The commands to time, and whether Xet is left on."""
    push = ckpt("push", checkpoint, REPO, "--uncommitted")
    upload = [PYTHON, "-c", UPLOAD, str(converted), REPO]
    return {
        "ckpt push, Xet": ([*push, "--transport", "xet"], True),
        "upload_folder, Xet": (upload, True),
        "ckpt push, LFS": ([*push, "--transport", "lfs"], False),
        "upload_folder, LFS": (upload, False),
        "ckpt push --stage-dir, Xet": ([*push, "--stage-dir", str(stage)], True),
    }


def held(folders: list[Path]) -> int:
    """Bytes of the disk that lie below folders; what vanishes meanwhile is not counted."""
    total = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(where, name)).st_blocks * 512
                except OSError:
                    continue
    return total


def run(command: list[str], work: Path, xet: bool) -> Cost:
    """Run a push against a Hub of its own."""
    with tempfile.TemporaryDirectory(prefix="push-", dir=work) as name:
        folder = Path(name)
        client = [folder / "hub-client", folder / "cache", folder / "tmp", folder / "stage"]
        client[2].mkdir()
        with hub(folder / "hub") as server:
            env = server.env() | {
                "PYTHONPATH": str(REPOSITORY),
                "XDG_CACHE_HOME": str(client[1]),
                "TMPDIR": str(client[2]),
                "HF_HUB_DISABLE_XET": "0" if xet else "1",
            }
            command = [part.replace("STAGE", str(client[3])) for part in command]
            most, done = 0, threading.Event()

            def watch() -> None:
                nonlocal most
                while not done.wait(0.05):
                    most = max(most, held(client))

            watcher = threading.Thread(target=watch)
            watcher.start()
            with tempfile.TemporaryFile() as said:
                start = time.perf_counter()
                process = subprocess.Popen(
                    command, cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT
                )
                _, status, usage = os.wait4(process.pid, 0)
                wall = time.perf_counter() - start
                process.returncode = os.waitstatus_to_exitcode(status)
                done.set()
                watcher.join()
                if process.returncode:
                    said.seek(0)
                    raise click.ClickException(f"{shlex.join(command)}\n{said.read().decode()}")
            return Cost(wall, usage.ru_maxrss * 1024, max(most, held(client)))


def bars(costs: dict[str, list[Cost]]) -> list[Bar]:
    """What was promised, what was measured, whether it held."""
    found = []
    for way in ("Xet", "LFS"):
        ours, theirs = costs.get(f"ckpt push, {way}"), costs.get(f"upload_folder, {way}")
        if not ours or not theirs:
            continue
        ratio = median(c.wall for c in ours) / median(c.wall for c in theirs)
        what = f"`ckpt push` by {way}"
        found.append(
            (f"{what}: at most {SLOWER} x `upload_folder`", f"{ratio:.2f} x", ratio <= SLOWER)
        )
        peak, disk = max(c.peak for c in ours), max(c.disk for c in ours)
        found.append((f"{what}: peak under 256 MiB", f"{peak / MIB:.0f} MiB", peak < MEMORY))
        found.append((f"{what}: under 50 MB of disk", f"{disk / 1e6:.1f} MB", disk < DISK))
    return found


def page(costs: dict[str, list[Cost]], about: str) -> str:
    """The tables."""
    promised = ((what, found, "yes" if good else "**no**") for what, found, good in bars(costs))
    rows = (
        (
            name,
            f"{median(c.wall for c in each):.1f}",
            f"{min(c.wall for c in each):.1f} - {max(c.wall for c in each):.1f}",
            f"{max(c.peak for c in each) / MIB:.0f}",
            f"{max(c.disk for c in each) / 1e6:.1f}",
        )
        for name, each in costs.items()
        if each
    )
    return "\n".join(
        [
            about,
            table("bar|measured|held", promised),
            table("push|seconds|min - max|peak, MiB|disk, MB", rows),
        ]
    )


@click.command()
@click.option("--gb", default=5.0, show_default=True, help="GB of fp32 weights, near enough.")
@click.option("--runs", default=3, show_default=True, help="Times that each way is run.")
@click.option("--only", multiple=True, help="Run only the ways whose names begin so.")
@click.option("--folder", type=FOLDER, help="Where to work; takes 6 bytes for each of --gb.")
@click.option("--checkpoint", type=FOLDER, help="Push this one instead of one that is made.")
@click.option("--json", "as_json", type=FILE, help="Write every single cost there.")
def main(
    gb: float,
    runs: int,
    only: tuple[str, ...],
    folder: Path | None,
    checkpoint: Path | None,
    as_json: Path | None,
) -> None:
    """Measure pushes by turns, and print the tables."""
    with tempfile.TemporaryDirectory(prefix="bench-push-", dir=folder) as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint = work / "checkpoint-1"
            build(checkpoint, 3, gb)
        converted = work / "converted"
        subprocess.run(
            ckpt("to-fp32", checkpoint.absolute(), "-o", converted),
            cwd=REPOSITORY,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (converted / "conversion.json").unlink()
        chosen = {
            n: c
            for n, c in ways(checkpoint.absolute(), converted, Path("STAGE")).items()
            if n.startswith(only or "")
        }
        costs: dict[str, list[Cost]] = {name: [] for name in chosen}
        for turn in range(runs):
            for name, (command, xet) in chosen.items():
                for path in (*checkpoint.rglob("*.pt"), *converted.glob("*.safetensors")):
                    with open(path, "rb") as file:
                        while file.read(1 << 24):
                            pass
                costs[name].append(run(command, work, xet))
                click.echo(f"{turn + 1}/{runs}  {costs[name][-1].wall:7.2f} s  {name}", err=True)
        where = machine(work)
    command = shlex.join(["python", "scripts/bench/bench_push.py", *sys.argv[1:]])
    click.echo(
        page(costs, ABOUT.format(command=command, gb=gb, runs=runs, machine=where)), nl=False
    )
    if as_json:
        as_json.write_text(json.dumps({"fields": Cost._fields, "costs": costs}, indent=1))


if __name__ == "__main__":
    main()
