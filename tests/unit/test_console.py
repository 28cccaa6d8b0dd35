"""What is said: by the logger "ckpt", and on stderr where no logging is configured."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from paths import ROOT
from syntax_trees import nodes

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


LOGGER = "logging.getLogger('ckpt')"
INFO, WARNING = ("logging.basicConfig(level=logging.INFO)", "logging.basicConfig(level=30)")
OWN = f"{LOGGER}.addHandler(logging.StreamHandler()); {LOGGER}.setLevel(logging.DEBUG)"
# By name: the rank, what runs before ckpt is imported and after, and what is to be on stderr.
CASES: dict[str, tuple[int, str, str, list[str]]] = {
    "rank 0": (0, "", "", ["ckpt: saved out/checkpoint-5", "ckpt: a doubt"]),
    "another rank warns": (1, "", "", ["ckpt: a doubt"]),
    "INFO before": (0, INFO, "", ["INFO:ckpt:saved out/checkpoint-5", "WARNING:ckpt:a doubt"]),
    "INFO after": (0, "", INFO, ["INFO:ckpt:saved out/checkpoint-5", "WARNING:ckpt:a doubt"]),
    "WARNING before": (0, WARNING, "", ["WARNING:ckpt:a doubt"]),
    "WARNING after": (0, "", WARNING, ["WARNING:ckpt:a doubt"]),
    "level after": (0, "", f"{LOGGER}.setLevel(logging.ERROR)", []),
    "level before": (0, f"{LOGGER}.setLevel(logging.WARNING)", "", ["ckpt: a doubt"]),
    "a handler that says nothing": (
        *(0, "", f"{LOGGER}.addHandler(logging.NullHandler())"),
        ["ckpt: saved out/checkpoint-5", "ckpt: a doubt"],
    ),
    "a handler": (0, "", OWN, ["a detail", "saved out/checkpoint-5", "a doubt"]),
}
# Each case in a fork of one process that has imported torch, but nothing of ckpt.
FORKS = """
import json, os, sys
import torch.distributed
for name, (rank, script) in json.load(sys.stdin).items():
    if not os.fork():
        os.environ["RANK"] = str(rank)
        os.dup2(os.open(os.path.join(sys.argv[1], name), os.O_CREAT | os.O_WRONLY), 2)
        exec(script)
        raise SystemExit
    if os.wait()[1]:
        raise SystemExit(name)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a process writes to stderr that imports a room of training and logs three messages."""
    scripts = {
        name: (
            rank,
            f"import logging\n{before}\nimport ckpt.distributed\n{after}\n"
            f"log = logging.getLogger('ckpt')\n{LINES}",
        )
        for name, (rank, before, after, _) in CASES.items()
    }
    folder = tmp_path_factory.mktemp("said")
    subprocess.run(
        [sys.executable, "-c", FORKS, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=json.dumps(scripts),
        text=True,
        check=True,
        timeout=300,
    )
    return {name: (folder / name).read_text().splitlines() for name in CASES}


@pytest.mark.oracle  # a process imports torch
def test_rank_0_says_what_it_does_unless_the_application_decides(
    said: dict[str, list[str]],
) -> None:
    assert said == {name: expected for name, (*_, expected) in CASES.items()}


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
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITES
    ]
    assert set(printed) == {"ckpt/distributed/console.py"}


def test_the_library_warns_by_its_logger() -> None:
    """``warnings.warn`` is for names that will be removed: its filters are Python's, not ours."""
    calls = {
        str(path.relative_to(ROOT))
        for package in ("ckpt", "converters")
        for path in (ROOT / package).rglob("*.py")
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    }
    assert calls == {"ckpt/deprecation.py"}


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
