"""All launchers, all ways of being signalled: which step was saved, and how it ended.

python scripts/kills/try_launchers.py [FOLDER]       about ten minutes; prints a table
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/support")]
from launches import LAUNCHERS, launch  # noqa: E402

TARGETS = ("launcher", "all", "ranks", "one")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main(folder: Path) -> None:
    print("| launcher | signalled | signal | saved | exit code | seconds |")
    print("|---|---|---|---|---:|---:|")
    for name in LAUNCHERS:
        for to in TARGETS:
            for number in SIGNALS:
                out = folder / f"{len(list(folder.iterdir()))}"
                try:
                    ended = launch(name, to, number, out)
                    saved = f"all ranks step {ended.step}"
                    rest = f"{ended.code} | {ended.seconds:.1f}"
                except (AssertionError, FileNotFoundError, ValueError) as error:
                    saved, rest = f"**no** ({type(error).__name__})", "- | -"
                print(f"| {name} | {to} | {number.name} | {saved} | {rest} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
