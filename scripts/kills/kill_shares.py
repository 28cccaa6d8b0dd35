"""Kills a process of several that make one output, and tells what the next run makes of it.

    python scripts/kills/kill_shares.py --points 50

For every point: two processes write a share each, and a third command joins them. One of these
is killed at its N-th file operation (tests/support/faults counts them; in every second round a
write is cut in half first). The output may then be there whole, or not at all. Then all three run
again, and the output has to have the bytes that one process makes. Exit code 1 if any point is not
good.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/support")]
from faults.forks import Forks  # noqa: E402

SOURCE = REPOSITORY / "fixtures/trainer-zero3/checkpoint-2"
COMMANDS = {
    "to-fp32": ["to-fp32", SOURCE, "--dtype", "bf16", "--max-shard-size", "100KB"],
    "to-fp32 --format bin": ["to-fp32", SOURCE, "--format", "bin"],
    "reshard": ["reshard", SOURCE, "--world-size", "3"],
    "to-universal": ["to-universal", SOURCE],
    "to-dcp": ["to-dcp", SOURCE, "--files", "2"],
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def steps_of(command: list[object], output: Path) -> list[list[object]]:
    """The two shares and their joining."""
    shares = [[*command, "-o", output, "--share", f"{number}/2"] for number in (1, 2)]
    return [*shares, ["join", output]]


def points(counts: list[int], number: int) -> Iterator[tuple[int, int, str]]:
    """Which step is killed at which operation, and how: spread evenly over all operations."""
    total = sum(counts)
    for index in range(number):
        at = 1 + round(index * (total - 1) / max(number - 1, 1))
        step = 0
        while at > counts[step]:
            at -= counts[step]
            step += 1
        yield step, at, "torn" if index % 2 else "kill"


def verdict(
    forks: Forks, command: list[object], folder: Path, point: tuple[int, int, str]
) -> tuple[str, str]:
    """What came of one kill, and what the failing command said."""
    output, (killed_step, at, fault) = folder / "out", point
    whole = contents(folder / "whole")
    for index, words in enumerate(steps_of(command, output)):
        if index == killed_step:
            forks.run(words, folder, at=at, do=fault)
            break
        if (ended := forks.run(words, folder)).status:
            return "FAILED BEFORE", ended.said

    if output.exists():
        found = contents(output)
        found.pop(".joined", None)
        if found != whole:
            return "TORN", str(sorted(found.keys() ^ whole.keys()))
    steps = steps_of(command, output)
    for words in [*([] if output.exists() else steps[:2]), steps[2]]:
        if (ended := forks.run(words, folder)).status and "it is there already" not in ended.said:
            return "DOES NOT CONTINUE", ended.said

    left = {path.name for path in folder.iterdir()} - {"whole"}
    if left != {"out"} or contents(output) != whole:
        return "OTHER BYTES", str(left)
    return "continued", ""


@click.command()
@click.option("--points", "number", default=50, show_default=True, help="Kills for each command.")
def main(number: int) -> None:
    """Kill, continue, and print a table."""
    is_bad = False
    click.echo("| command | kills | continued | anything else |")
    click.echo("| --- | ---: | ---: | ---: |")
    with Forks() as forks:
        for title, command in COMMANDS.items():
            counts = Counter[str]()
            with tempfile.TemporaryDirectory(prefix="kill-shares-") as name:
                folder = Path(name)
                ended = forks.run([*command, "-o", folder / "whole"], folder)
                assert not ended.status, ended.said
                steps = steps_of(command, folder / "out")
                operations = [forks.run(words, folder).count for words in steps]
                for point in points(operations, number):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    shutil.rmtree(folder / ".out.partial", ignore_errors=True)
                    word, said = verdict(forks, command, folder, point)
                    counts[word] += 1
                    if word != "continued":
                        click.echo(f"{title} {point}: {word}: {said}", err=True)
            others = number - counts["continued"]
            is_bad = is_bad or bool(others)
            click.echo(f"| `{title}` | {number} | {counts['continued']} | {others} |")
    if is_bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
