"""Random models trained by real DeepSpeed: our conversion, DeepSpeed's, and the live values.

Ours has to be what the live engine held, bit for bit; DeepSpeed's has to be ours, or the difference
is a row of docs/deepspeed-differences.md (``known``). A case is ``cases.make(seed, index)``; one
alone, its files left in WORK/N:

    cd tests/support/hardening/differential
    python warm.py WORK --seed S --first N --count 1 --extensions --keep
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import warm_ranks

from hardening.differential.known import KNOWN

WARM = Path(__file__).with_name("warm.py")
GRACE = 600.0  # seconds beyond its time that it is waited for: it may have to compile first


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Cases until the time is over; differences are counted by case and by row."""
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("stage", "dtype", "world")}
    rows: Counter[str] = Counter()
    untrained: Counter[str] = Counter()
    findings: list[str] = []
    cases = equal = listed = 0
    options = ("--seed", seed, "--seconds", seconds, "--extensions")
    for verdict in _told(verdicts(work, *options, limit=seconds), findings):
        if "untrained" in verdict:
            untrained[verdict["untrained"]] += 1
            say(f"DeepSpeed cannot train {verdict['case']}: {verdict['untrained']}")
            continue
        cases += 1
        for key, counter in counts.items():
            counter[str(verdict[key])] += 1
        equal += not verdict["rows"] and not verdict["findings"]
        listed += bool(verdict["rows"]) and not verdict["findings"]
        rows.update(verdict["rows"].keys())
        findings += [f"{verdict['case']}: {line}" for line in verdict["findings"]]
        say(f"{cases} cases, {equal} equal, {listed} on the list, {len(findings)} findings")
    by = {f"by {key}": dict(sorted(counter.items())) for key, counter in counts.items()}
    return {
        "cases": cases,
        **by,
        "equal": equal,
        "on the list": listed,
        "cases by row": dict(rows.most_common()),
        "rows not met": [known.row for known in KNOWN if known.row not in rows],
        "not trained by DeepSpeed": dict(untrained),
        "findings": findings,
    }


def _told(said: Iterator[dict[str, Any]], findings: list[str]) -> Iterator[dict[str, Any]]:
    """The same; that it ended before its time is a finding, not the end of the counts."""
    try:
        yield from said
    except RuntimeError as error:
        findings.append(str(error))


def verdicts(work: Path, *options: object, limit: float) -> Iterator[dict[str, Any]]:
    """What ``warm`` says of each case, as soon as it says so; ``limit`` in seconds.

    It is a fork of the process that ranks of tests are forks of. Raises ``RuntimeError`` if it
    fails.
    """
    lines = work / "verdicts"
    lines.touch()
    with ThreadPoolExecutor(1) as pool, lines.open() as file:
        launch = pool.submit(
            warm_ranks.run,
            str(WARM),
            [work, *options, "--out", lines],
            ranks=1,
            limit=limit + GRACE,
            environment=warm_ranks.NOT_COMPILED,
            elastic=False,
            shares_imports=False,
        )
        yield from map(json.loads, _lines(file, launch))
        ended = launch.result()
    if ended.returncode:
        raise RuntimeError(f"{WARM.name}: {ended.returncode}, {ended.stderr[-2000:]}")


def _lines(file: IO[str], launch: Future[Any]) -> Iterator[str]:
    """The whole lines that are written into a file until a launch has ended."""
    rest, is_last = "", False
    while not is_last:
        is_last = launch.done()
        *whole, rest = (rest + file.read()).split("\n")
        yield from whole
        time.sleep(0.05)
