"""What is said: by the logger "ckpt", and on stderr where no logging is configured."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from oracles import ROOT

from ckpt.distributed import console

# Modules that are programs of their own: what they print is read by whoever started them.
PROGRAMS = {
    "ckpt/zero_to_fp32.py",
    "ckpt/weights/reader/installed.py",
    "converters/names/substitution.py",
}
WRITES = {"print", "click.echo", "sys.stderr.write", "sys.stdout.write"}
LINES = """
log.debug("a detail")
log.info("saved %s", "out/checkpoint-5")
log.warning("a doubt")
"""


def said(before: str = "", rank: int = 0, after: str = "") -> list[str]:
    """What a process writes to stderr that imports a room of training and logs three messages."""
    script = f"import logging\n{before}\nimport ckpt.distributed\n{after}\n"
    script += f"log = logging.getLogger('ckpt')\n{LINES}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stderr.splitlines()


def test_without_logging_rank_0_says_what_it_does_and_all_ranks_warn() -> None:
    assert said() == ["ckpt: saved out/checkpoint-5", "ckpt: a doubt"]
    assert said(rank=1) == ["ckpt: a doubt"]


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_the_logging_of_the_application_decides(level: str) -> None:
    configured = f"logging.basicConfig(level=logging.{level})"
    expected = ["INFO:ckpt:saved out/checkpoint-5"] if level == "INFO" else []
    expected.append("WARNING:ckpt:a doubt")
    assert said(before=configured) == expected
    assert said(after=configured) == expected


def test_a_level_and_a_handler_of_the_logger_itself_count() -> None:
    logger = "logging.getLogger('ckpt')"
    assert said(after=f"{logger}.setLevel(logging.ERROR)") == []
    assert said(before=f"{logger}.setLevel(logging.WARNING)") == ["ckpt: a doubt"]
    quiet = f"{logger}.addHandler(logging.NullHandler())"
    assert said(after=quiet) == ["ckpt: saved out/checkpoint-5", "ckpt: a doubt"]
    own = f"{logger}.addHandler(logging.StreamHandler()); {logger}.setLevel(logging.DEBUG)"
    assert said(after=own) == ["a detail", "saved out/checkpoint-5", "a doubt"]


def test_pytest_sees_messages_once(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import ckpt.distributed  # noqa: F401

    log = logging.getLogger("ckpt")
    log.info("not shown, by the level of the root logger")
    log.warning("a doubt")
    with caplog.at_level(logging.INFO):
        log.info("saved")
    assert [record.getMessage() for record in caplog.records] == ["a doubt", "saved"]
    assert capsys.readouterr().err == ""


def test_the_library_prints_nothing() -> None:
    printed = [
        str(path.relative_to(ROOT))
        for package in ("ckpt", "converters")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not is_program(path)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITES
    ]
    assert set(printed) == {"ckpt/distributed/console.py"}


def test_a_message_is_one_write() -> None:
    writes: list[str] = []

    class Stderr:
        write = staticmethod(writes.append)
        flush = staticmethod(lambda: None)

    # ranks run with "python -u", where two writes of two ranks become one line and an empty one
    with mock.patch("sys.stderr", Stderr), mock.patch.object(console, "_is_configured", bool):
        console.Console().emit(logging.LogRecord("ckpt", 30, "", 0, "a doubt", None, None))
    assert writes == ["ckpt: a doubt\n"]


def is_program(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return name in PROGRAMS or name.startswith("ckpt/cli/")
