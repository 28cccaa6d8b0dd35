"""Kills ranks at each file operation of a save and tells what training can resume from.

For every point: two ranks train, commit a checkpoint at step 2, and are killed, one or both, at the
N-th file operation of the save of step 4 (tests/support/faults counts them; in every second round a
write is cut in half first). Then new ranks resume as a user of that front would (``kill_fronts``),
train to step 6 and save again. The point is good if they went on from step 2 or 4 and end with the
same state as a run that was not disturbed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from forked_ranks import LIMIT, RANKS, Ended, Fault, import_what_was, preload, run_ranks
from tqdm import tqdm

PLAIN_STOCK = ["trainer-alone", "trainer-ddp", "trainer-fsdp"]
OF_TORCH = ["torch-saver", "torch-background", "dcp", "dcp-metadata"]  # FSDP2 in a plain loop
STOCK = ["deepspeed", "trainer", *PLAIN_STOCK, "dcp", "dcp-metadata"]
PLAIN = [*PLAIN_STOCK, "hf-alone", "hf-ddp", "hf-fsdp", "hf-fsdp-callback"]
NAMES = ["deepspeed", "trainer", "saver", "saver-background"]
NAMES += ["hf-mixin", "hf-callback", "accelerate", "lightning"]
PARALLEL = ["saver-tensor", "saver-pipeline", "saver-experts"]
NAMES += PARALLEL
SAVED, SWEPT, LAST = 2, 4, 6  # the steps of the saves: before, disturbed, after resuming
VICTIMS = ("rank 0", "rank 1", "both")
POWER = "power"
VERDICTS = {
    "resumed": "the training went on from the checkpoint of step 2 or 4, all of the state there",
    "refused": "resuming ended with an error",
    "wrong": "it resumed without an error and ended with another state",
    "lost": "it began from the start, with checkpoints there",
    "unharmed": "the ranks ended before that operation",
}


@dataclass(frozen=True, slots=True)
class Point:
    """What came of one kill. ``start`` is the step resumed from, ``why`` what resuming said.

    ``hung``: a rank that was left did not end; ``silent``: it ended as if all were well, and nobody
    can resume from the step that it saved.
    """

    fault: Fault
    verdict: str
    start: int
    why: str
    hung: bool
    silent: bool
    seconds: float


def kills(counts: list[int], points: int) -> Iterator[Fault]:
    """Spread evenly over the operations: rank 0 killed at its own, rank 1 at its own, both.

    Of a single process, that one.
    """
    if len(counts) == 1:
        for index in range(points):
            at = 1 + round(index * (counts[0] - 1) / max(points - 1, 1))
            yield Fault(0, at, False, bool(index % 2))
        return

    for index in range(points):
        victim, nth = index % len(VICTIMS), index // len(VICTIMS)
        rank, of = victim % RANKS, (points - victim + 2) // len(VICTIMS)
        at = 1 + round(nth * (counts[rank] - 1) / max(of - 1, 1))
        yield Fault(rank, at, victim == 2, bool(nth % 2))


def power_failures(counts: list[int], points: int) -> Iterator[Fault]:
    """Spread evenly over the operations of rank 0; the last one is when the save is over."""
    for index in range(points):
        at = 1 + round(index * counts[0] / max(points - 1, 1))
        yield Fault(0, at, True, bool(index % 2), power=True)


class Sweep:
    """The sweep of one front, in a folder of its own."""

    def __init__(
        self, front: Callable[[Any], Any], task: Callable[..., Any], work: Path, ranks: int
    ):
        self.front, self.task, self.work, self.ranks = front, task, work, ranks
        self.expected: dict[int, list[str]] = {}  # by step resumed from, the ranks' last states

    def undisturbed(self) -> list[int]:
        """How many operations each rank's save takes; learns what resuming should end with."""
        counts: list[int] = []
        for last in (SAVED, SWEPT):
            out = self.work / f"whole-{last}"
            ended = self._whole("train", out, last, resume=False)
            counts = [each.count for each in ended]
            resumed = self._whole("resume", out, LAST, resume=True)
            if {each.start for each in resumed} != {last}:
                raise click.ClickException(f"undisturbed, it resumed from {resumed}, not {last}")
            self.expected[last] = [each.digest for each in resumed]
            shutil.rmtree(out)
        whole = self._whole("straight", self.work / "straight", LAST, resume=False)
        for last in (SAVED, SWEPT):
            if self.expected[last] != [each.digest for each in whole]:
                click.echo(f"note: resuming from {last} is not as never having stopped", err=True)
        return counts

    def _whole(self, name: str, out: Path, last: int, resume: bool) -> list[Ended]:
        logs = self.work / "logs" / f"{out.name}-{name}"
        task = self.task(out, last=last, resume=resume)
        ended = run_ranks(self.front, task, logs, count=not resume, ranks=self.ranks)
        if any(each.status for each in ended):
            raise click.ClickException(f"undisturbed, it failed; see {logs}: {ended}")
        import_what_was(logs)
        return ended

    def point(self, number: int, fault: Fault) -> Point:
        """Kills at one point, and judges by resuming what is there then."""
        begun = time.monotonic()
        out, logs = self.work / f"point-{number}", self.work / "logs" / f"point-{number}"
        task = self.task(out, last=SWEPT, resume=False)
        killed = run_ranks(self.front, task, logs / "train", fault, ranks=self.ranks)
        hung = any(each.hung for each in killed)
        if all(each.status != -signal.SIGKILL for each in killed) and not fault.power:
            verdict, start, why = "unharmed", -1, VERDICTS["unharmed"]
        else:
            verdict, start, why = self._judged(out, logs / "resume")
        if verdict in ("resumed", "unharmed") and not hung:
            shutil.rmtree(logs)
            shutil.rmtree(out)
        silent = verdict != "unharmed" and start != SWEPT and any(e.status == 0 for e in killed)
        return Point(fault, verdict, start, why, hung, silent, time.monotonic() - begun)

    def _judged(self, out: Path, logs: Path) -> tuple[str, int, str]:
        task = self.task(out, last=LAST, resume=True)
        ended = run_ranks(self.front, task, logs, ranks=self.ranks)
        if any(each.status for each in ended):
            said = [each.said for each in ended if each.status]
            own = [line for line in said if "onnection" not in line]  # not the other rank's end
            return "refused", -1, " | ".join(dict.fromkeys(own or said))
        start = ended[0].start
        if start not in self.expected:
            return "lost", start, VERDICTS["lost"]
        if self.expected[start] != [each.digest for each in ended]:
            return "wrong", start, VERDICTS["wrong"]
        return "resumed", start, ""


def rows(front: str, stage: int, counts: list[int], points: list[Point]) -> Iterator[str]:
    """A line of the table for each kind of kill."""
    for victim in (*VICTIMS, POWER):
        chosen = [point for point in points if victim_of(point.fault) == victim]
        if chosen:
            verdicts = Counter(point.verdict for point in chosen)
            starts = Counter(point.start for point in chosen if point.verdict == "resumed")
            cells = [front, stage, victim, counts[victim == VICTIMS[1]], len(chosen)]
            cells += [starts[SWEPT], starts[SAVED]]
            cells += [verdicts[name] for name in ("refused", "wrong", "lost", "unharmed")]
            cells += [sum(p.hung for p in chosen), sum(p.silent for p in chosen)]
            yield f"| {' | '.join(map(str, cells))} |"


def victim_of(fault: Fault) -> str:
    """Who is killed."""
    if fault.power:
        return POWER
    return VICTIMS[2 if fault.everyone else fault.rank]


HEAD = (
    "| front | stage | killed | operations | points | resumed from 4 | from 2 | **refused** "
    "| **other state** | starts over | not reached | hung | silent |\n"
    "| --- | ---: | --- |" + " ---: |" * 10
)
ABOUT = """\
# What is left when a save is killed

What a training can resume from when its save is killed at any moment. A kill was tried at the file
operations of a save, with plain DeepSpeed, the plain Trainer and each front end of `ckpt`. This
command tries again and writes the first part of this page:

```sh no-run
{command}
```

For every point two gloo ranks trained a tiny GPT-2 with dropout under DeepSpeed on a CPU, saved
after step 2, and were killed (SIGKILL) at one file operation of the save after step 4. The points
are spread evenly over all writes, syncs, renames and removals of that rank; in every second round
the write at which the rank is killed is half done. *power* kills both ranks and then takes from
every file what was not synced: the file is empty or holds zeros, as after a power failure under
ext4, where names and renames are on disk in their order. New ranks then resumed as a user of that
front end does, trained to step 6 and saved again.

- *Resumed*: the state after step 6 (master weights, moments, weights, random numbers) is that of a
  run that was not disturbed.
- *Refused*: resuming ended with an error.
- *Other state*: resuming ended without an error, and with another state.
- *Starts over*: the training began from the start, though there were checkpoints.
- *Not reached*: the save took fewer operations than were counted before, so nobody was killed.
- *Hung*: the remaining rank did not end within {limit:.0f} s.
- *Silent*: a rank ended as if all were well, and nobody can resume from the step that it saved.

`deepspeed` is a loop around an engine that resumes from what `latest` names; `trainer` is the
Hugging Face Trainer with `resume_from_checkpoint=True`. `dcp` and `dcp-metadata` are loops around
FSDP2 that save with `dcp.save` and delete the checkpoint before; they resume from the folder of the
highest number, or from the highest with a `.metadata`. All others are front ends of `ckpt`,
`torch-saver` and `torch-background` with FSDP2 and without DeepSpeed. They keep only the newest
checkpoint, so the save of step 4 deletes that of step 2 too. Before they resume, and after they
have saved again, every byte of what is committed is checked.

{table}
"""


@click.command()
@click.option("--points", default=200, show_default=True, help="Kills, of each front.")
@click.option("--power", default=50, show_default=True, help="Power failures, of each front.")
@click.option(
    "--front",
    type=click.Choice([*NAMES, *OF_TORCH, *PLAIN]),
    multiple=True,
    help="Default: all with DeepSpeed.",
)
@click.option("--stage", type=click.IntRange(1, 3), default=2, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where to work.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the page.")
@click.option("--json", "as_json", type=click.Path(dir_okay=False, path_type=Path))
def main(
    points: int,
    power: int,
    front: tuple[str, ...],
    stage: int,
    folder: Path | None,
    markdown: Path | None,
    as_json: Path | None,
) -> None:
    """Kill ranks at file operations of a save, and print what could be resumed from.

    What is left of points that are not good, and what the ranks said, stays in a folder under
    FOLDER. Exits 1 if there is one among the fronts of ckpt.
    """
    preload()
    tqdm.monitor_interval = 0  # a thread, which forks would lack
    lines, found = [HEAD], dict[str, list[Any]]()
    for name in front or NAMES:
        counts, done = swept(name, stage, points, power, folder)
        lines += rows(name, stage, counts, done)
        found[name] = [asdict(each) for each in done]
        click.echo("\n".join(lines if len(lines) < 6 else lines[-4:]))
    if markdown:
        command = shlex.join(["python", "scripts/kills/kill_sweep.py", *sys.argv[1:]])
        text = ABOUT.format(command=command, limit=LIMIT, table="\n".join(lines))
        markdown.write_text(text)
    if as_json:
        as_json.write_text(json.dumps(found, indent=1))
    bad = [each for name, all_ in found.items() if name not in STOCK for each in all_]
    raise SystemExit(any(each["verdict"] != "resumed" or each["hung"] for each in bad))


def swept(
    front: str, stage: int, points: int, power: int, folder: Path | None
) -> tuple[list[int], list[Point]]:
    """The operations of each rank's save, and what came of every point."""
    from kill_fronts import FRONTS, Task

    fronts = FRONTS
    if front in OF_TORCH:
        import kill_torch

        fronts = kill_torch.FRONTS
    elif front in PLAIN:
        import kill_fronts_plain

        fronts = kill_fronts_plain.FRONTS
    elif front not in STOCK:
        import kill_fronts_ckpt

        fronts = kill_fronts_ckpt.FRONTS
    work = Path(tempfile.mkdtemp(prefix=f"sweep-{front}-", dir=folder))

    def task(out: Path, last: int, resume: bool) -> Task:
        return Task(out, stage, last, resume)

    ranks = 1 if front.endswith("-alone") else RANKS
    sweep, done = Sweep(fronts[front], task, work, ranks), list[Point]()
    counts = sweep.undisturbed()
    faults = [*kills(counts, points), *power_failures(counts, power)]
    with suppress(KeyboardInterrupt):  # then the table has those that there are
        for number, fault in enumerate(tqdm(faults, front, disable=None)):
            done.append(sweep.point(number, fault))
            if done[-1].verdict == "unharmed":  # this save took an operation less
                done[-1] = sweep.point(number, replace(fault, at=fault.at - 1))
            if done[-1].verdict != "resumed" or done[-1].hung:
                tqdm.write(f"{front} {number}: {done[-1]}", sys.stderr)
    if all(point.verdict == "resumed" and not point.hung for point in done):
        shutil.rmtree(work)
    return counts, done


if __name__ == "__main__":
    main()
