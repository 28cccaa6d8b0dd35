"""Tasks: ``nox -l`` lists them, ``nox -s NAME`` runs one; what follows ``--`` goes to its command.

nox and not just: pip installs it with the other tools, and a task is plain Python.

They run in the environment that nox is in, since torch and DeepSpeed take gigabytes. A fresh one
is what ``.ci/run`` makes, and the workflow in ``.github`` for each version of Python.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "test"]
nox.needs_version = ">=2024.3.2"

# Tests that need neither DeepSpeed nor transformers.
QUICK = (
    "architecture",
    "cast",
    "checkpoints",
    "cli",
    "element_types",
    "imports",
    "inert",
    "instead",
    "matching",
    "plain",
    "retention",
    "runs_manifest",
    "tensors",
    "torch_files",
    "weights_sources",
)


def run(session: nox.Session, *command: str) -> None:
    """Runs a module or a script with the Python that nox runs with, and the session's arguments."""
    session.run(sys.executable, *command, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, ruff format, codespell."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")
    session.run(sys.executable, "-m", "codespell_lib", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on both packages, as on Linux, macOS and Windows."""
    for platform in ("linux", "darwin", "win32"):
        cache = f".mypy_cache/{platform}"
        run(session, "-m", "mypy", "--platform", platform, "--cache-dir", cache)


@nox.session
def test(session: nox.Session) -> None:
    """The tests of tests/unit: under a minute on two processes."""
    run(session, "-m", "pytest", "-m", "unit", "-n", "2")


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests that need neither DeepSpeed nor transformers, for Pythons that these lack."""
    tests = Path(__file__).parent / "tests"
    modules = (str(path) for name in QUICK for path in tests.glob(f"*/test_{name}.py"))
    run(session, "-m", "pytest", *modules)


@nox.session
def systems(session: nox.Session) -> None:
    """What works on macOS and Windows, without torch; on Linux both are imitated."""
    run(session, "-m", "pytest", "tests/commands/test_systems.py")


@nox.session
def matrix(session: nox.Session) -> None:
    """Old and new versions of other libraries, each in an environment of its own."""
    run(session, "scripts/matrix/run_matrix.py")


@nox.session(name="test-all")
def test_all(session: nox.Session) -> None:
    """All tests, on two processes, as ``.ci/run`` runs them."""
    run(session, "-m", "pytest", "-n", "2", "--dist", "loadgroup")


@nox.session
def docs(session: nox.Session) -> None:
    """Every code block and link of the documentation; what the next changelog will say."""
    run(session, "-m", "pytest", "tests/commands/test_docs.py")
    session.run(sys.executable, "-m", "towncrier", "build", "--draft", "--version", "next")


@nox.session
def bench(session: nox.Session) -> None:
    """Conversions beside ``cp`` and DeepSpeed's ``zero_to_fp32``; for a quiet machine."""
    run(session, "scripts/bench/bench.py")


@nox.session
def harden(session: nox.Session) -> None:
    """Attacks: ten minutes of all kinds, unless ``-- --minutes N`` says otherwise."""
    run(session, "scripts/harden.py")
