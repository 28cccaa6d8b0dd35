"""Fuzzing that follows coverage, by hand: needs ``pip install atheris``.

    PYTHONPATH=.:tests python -m hardening.fuzz.covering pickle -max_total_time=600 [CORPUS FOLDER]

Options are libFuzzer's. It ends with a traceback and a file crash-* at the first finding.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs one of ``targets.TARGETS`` under atheris."""
    import atheris

    with atheris.instrument_imports(include=["converters", "ckpt.runs"]):
        from hardening.fuzz.targets import TARGETS, fails

    name = sys.argv.pop(1)
    target = TARGETS[name]

    def once(data: bytes) -> None:
        wrong = fails(target, data)
        if wrong is not None:
            raise AssertionError(wrong)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
