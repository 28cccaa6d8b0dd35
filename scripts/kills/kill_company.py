"""Kills and stops the ranks of a training that is not alone in its folder, as ``kill_sweep`` does.

    others    checkpoints of three other runs are there before, two of them under names that this
              training saves under
    second    another job starts in the middle of the disturbed save, and tries until it gets in
    sleeper   the ranks are stopped at a file operation (SIGSTOP); a job that looks as if of another
              machine takes the folder over, saves under the same name, and they are woken

A point is good if the training's state is resumed from step 2 or 4 as ``kill_sweep`` demands, and
not a byte of what the others saved was changed or lost, neither by the kill nor by the resume; and
if nobody hung, the second job was refused while rank 0 lived, and got in when it did not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from forked_ranks import Fault, preload, run_ranks
from kill_sweep import LAST, SAVED, SWEPT, Point, Sweep, kills, power_failures
from tqdm import tqdm

COMPANIES = ("others", "second", "sleeper")
FRONTS = ("saver", "saver-background")
Files = dict[str, str]  # digests by path


@dataclass(frozen=True, slots=True)
class Stop(Fault):
    """All ranks are stopped, instead of killed."""

    @property
    def do(self) -> Any:
        """What the shim calls it."""
        return "stopgroup"


class CompanySweep(Sweep):
    """The sweep of one front in one sort of company."""

    def __init__(self, company: str, background: bool, work: Path):
        from kill_company_fronts import loop

        self.company, self.others = company, dict[str, Files]()
        super().__init__(partial(loop, background), self._task, work)
        self.visits: Counter[str] = Counter()

    def _task(self, out: Path, last: int, resume: bool) -> Any:
        from kill_fronts import Task

        if not resume and not out.exists():
            for source in sorted(self.work.glob("other-*/checkpoint-*")):
                shutil.copytree(source, out / source.name)
        return Task(out, 2, last, resume)

    def prepare(self) -> None:
        """The checkpoints of other runs that a training finds."""
        import kill_company_fronts
        from kill_company_fronts import looked_at

        steps = (SAVED, SWEPT, LAST) if self.company == "others" else ()
        for last in steps:
            self._whole("other", self.work / f"making-{last}", last, resume=False)
        for last in steps:
            (self.work / f"making-{last}").rename(self.work / f"other-{last}")
        for folder in self.work.glob("other-*/checkpoint-*"):
            self.others[folder.parent.name] = looked_at(folder)
            manifest = json.loads((folder / "manifest.json").read_text())
            kill_company_fronts.others.add(manifest["run"])

    def point(self, number: int, fault: Fault) -> Point:
        """As in ``kill_sweep``, and what became of the others."""
        begun = time.monotonic()
        out, logs = self.work / f"point-{number}", self.work / "logs" / f"point-{number}"
        task = self._task(out, SWEPT, False)
        guest = None if self.company == "others" else self._guest(number, out, logs)
        ended = run_ranks(self.front, task, logs / "train", fault)
        hung = any(each.hung for each in ended)
        wrong = [] if guest is None else self._parted(guest, logs, ended[0].status)
        kept = {**self.others, **self._guests(out)}
        wrong += self._harm(out, kept, "the kill")
        resumed, start, why = self._judged(out, logs / "resume")
        wrong += self._harm(out, kept, "the resume")
        verdict = "harmed" if wrong else resumed
        if verdict == "resumed" and not hung:
            shutil.rmtree(logs)
            shutil.rmtree(out)
        said = "; ".join([*wrong, why])
        return Point(fault, verdict, start, said, hung, False, time.monotonic() - begun)

    def _guest(self, number: int, out: Path, logs: Path) -> int:
        """Starts the second job, in a group of its own; its pid."""
        from kill_company_fronts import visit

        logs.mkdir(parents=True, exist_ok=True)
        out.mkdir()
        out.with_name(f"{out.name}.guest").touch()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.setpgid(0, 0)
                log = os.open(logs / "guest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                made = visit(out, self.company == "sleeper", stays=bool(number % 2))
                (logs / "guest.json").write_text(json.dumps(asdict(made)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        return pid

    def _parted(self, pid: int, logs: Path, status: int) -> list[str]:
        """What was wrong with the second job, when it has ended; ``status``: that of rank 0."""
        from kill_company_fronts import PATIENCE, Visit

        end = time.monotonic() + PATIENCE + 20
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return ["the second job hung"]
            time.sleep(0.01)
        try:
            made = Visit(**json.loads((logs / "guest.json").read_text()))
        except FileNotFoundError:
            lines = (logs / "guest.log").read_text().strip().splitlines()
            return [f"the second job failed: {lines[-1] if lines else ''}"]
        self.visits["refused"] += made.refused
        self.visits["entered"] += made.entered
        if not made.entered:
            return [f"the second job never got in: {made.said}"]
        awake = self.company == "second" and made.beside and status != 0
        return [f"the second job got in beside the first: {made.said}"] if awake else []

    def _guests(self, out: Path) -> dict[str, Files]:
        """What the second job has saved."""
        note = out.with_name(f"{out.name}.saved")
        found: dict[str, Files] = json.loads(note.read_text()) if note.exists() else {}
        note.unlink(missing_ok=True)
        return found

    def _harm(self, out: Path, kept: dict[str, Files], by: str) -> list[str]:
        """Checkpoints of others that are not there any more, as they were, under any name."""
        from kill_company_fronts import looked_at

        there = [looked_at(path) for path in out.iterdir() if path.is_dir()]
        lost = [name for name, held in kept.items() if held not in there]
        return [f"{name} was changed or lost by {by}" for name in lost]


def stops(counts: list[int], points: int) -> Iterator[Fault]:
    """Spread evenly over the operations of both ranks."""
    for fault in kills(counts, points):
        yield Stop(fault.rank, fault.at, True, False)


@click.command()
@click.option("--points", default=100, show_default=True, help="Kills, or stops, of each.")
@click.option("--power", default=20, show_default=True, help="Power failures among others.")
@click.option("--company", type=click.Choice(COMPANIES), multiple=True, help="Default: all.")
@click.option("--front", type=click.Choice(FRONTS), multiple=True, help="Default: both.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where to work.")
@click.option("--json", "as_json", type=click.Path(dir_okay=False, path_type=Path))
def main(
    points: int,
    power: int,
    company: tuple[str, ...],
    front: tuple[str, ...],
    folder: Path | None,
    as_json: Path | None,
) -> None:
    """Kill and stop ranks that are not alone in their folder; prints a line for each company.

    Exits 1 if a point is not good; what is left of it stays in a folder under FOLDER.
    """
    preload()
    tqdm.monitor_interval = 0  # a thread, which forks would lack
    found, bad = dict[str, list[Any]](), 0
    for name in company or COMPANIES:
        for kind in front or FRONTS:
            work = Path(tempfile.mkdtemp(prefix=f"company-{name}-{kind}-", dir=folder))
            sweep = CompanySweep(name, kind == "saver-background", work)
            done = swept(sweep, name, points, power)
            wrong = [p for p in done if p.verdict not in ("resumed", "unharmed") or p.hung]
            bad += len(wrong)
            starts = Counter(p.start for p in done if p.verdict == "resumed")
            said = f"{name}\t{kind}\t{len(done)} states\tfrom 4: {starts[SWEPT]}, "
            said += f"from 2: {starts[SAVED]}\t{len(wrong)} violations"
            click.echo(said + (f"\t{dict(sweep.visits)}" if sweep.visits else ""))
            found[f"{name} {kind}"] = [asdict(p) for p in done]
            if not wrong:
                shutil.rmtree(work)
    if as_json:
        as_json.write_text(json.dumps(found, indent=1))
    raise SystemExit(bool(bad))


def swept(sweep: CompanySweep, name: str, points: int, power: int) -> list[Point]:
    """What came of every point."""
    sweep.prepare()
    counts, done = sweep.undisturbed(), list[Point]()
    faults = [*(stops if name == "sleeper" else kills)(counts, points)]
    if name == "others":
        faults += power_failures(counts, power)
    with suppress(KeyboardInterrupt):  # then the line has those that there are
        for number, fault in enumerate(tqdm(faults, name, disable=None)):
            done.append(sweep.point(number, fault))
            if done[-1].verdict != "resumed" or done[-1].hung:
                tqdm.write(f"{name} {number}: {done[-1]}", sys.stderr)
    return done


if __name__ == "__main__":
    main()
