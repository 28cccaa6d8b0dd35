"""The versions of other libraries: what is too old is said before anything is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import tomllib
from oracles import ROOT

from ckpt import requirements
from converters.errors import CheckpointError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FRONT_ENDS = {
    "ckpt.trainers.hf": ("transformers", "accelerate", "deepspeed"),
    "ckpt.trainers.accelerate": ("accelerate", "deepspeed"),
    "ckpt.trainers.lightning": ("lightning", "deepspeed"),
}


def oldest_of_extras() -> dict[str, str]:
    found = {}
    for name, lines in PROJECT["optional-dependencies"].items():
        if name in ("test", "dev"):
            continue
        for line in lines:
            if match := re.match(r"([\w-]+)>=([\d.]+)", line):
                found[match[1]] = match[2]
    return found


def test_the_extras_say_the_same_versions() -> None:
    extras = oldest_of_extras()
    ours = {name: oldest for name, oldest in requirements.OLDEST.items() if name in extras}
    assert ours == {name: extras[name] for name in ours}
    assert set(requirements.OLDEST) - set(extras) == {"pytorch_lightning"}


def test_the_extra_all_has_every_other_one() -> None:
    extras = PROJECT["optional-dependencies"]
    names = set(extras) - {"test", "dev", "all"}
    assert extras["all"] == [f"ckpt-toolkit[{','.join(sorted(names))}]"]


@pytest.mark.parametrize("library", requirements.OLDEST)
def test_the_oldest_version_is_new_enough(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = requirements.OLDEST[library]
    for release in (oldest, f"{oldest}.0", f"{oldest}.1.dev0", f"{oldest}+cpu", "99.0"):
        monkeypatch.setattr(requirements, "version", lambda _, release=release: release)
        requirements.require("a test", library)

    monkeypatch.setattr(requirements, "version", lambda _: "0.9.5")
    if library not in ("deepspeed", "huggingface_hub"):
        with pytest.raises(CheckpointError, match=rf"0\.9\.5 is installed; pip install '{library}"):
            requirements.require("a test", library)


def test_versions_are_compared_by_their_numbers() -> None:
    releases = ("0.9.10", "0.16", "0.16.1", "1.0rc1", "4.49.0", "4.57.0.dev0", "4.57.6", "5")
    assert sorted(releases, key=requirements.numbers) == list(releases)
    assert requirements.numbers("2.13.0+cpu") == (2, 13)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requirements.OLDEST, "no_such_library", "3.1")
    with pytest.raises(CheckpointError) as raised:
        requirements.require("a push or pull", "no_such_library")
    assert str(raised.value) == (
        "a push or pull needs no_such_library 3.1 or newer, and it is not installed; "
        "pip install 'no_such_library>=3.1'"
    )


@pytest.mark.parametrize(("release", "is_old"), [("2.4.0+cu121", True), ("2.6.0", False)])
def test_a_torch_with_which_the_trainer_cannot_resume_is_named(
    release: str, is_old: bool, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr(requirements, "version", lambda _: release)
    monkeypatch.delenv("RANK", raising=False)
    requirements.warn_of_old_torch()
    sentence = f"torch {release}: the Trainer saves with it and cannot resume"
    assert (sentence in logged()) == is_old
    monkeypatch.setenv("RANK", "1")
    requirements.warn_of_old_torch()
    assert not logged()


def test_what_a_training_has_and_is_too_old_is_said_once(
    monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr(requirements, "_old_libraries", set())
    monkeypatch.delenv("RANK", raising=False)
    new = {**requirements.OLDEST, **requirements.OLDEST_BESIDES, "ckpt": "0.1", "python": "3.10"}
    requirements.warn_of_old(new)
    assert not logged()
    for library, oldest in {**requirements.OLDEST, **requirements.OLDEST_BESIDES}.items():
        requirements.warn_of_old({**new, library: "0.9.1"})
        assert f"{library} 0.9.1 is older than {oldest}, the oldest that ckpt was" in logged()
    requirements.warn_of_old({"torch": "0.9.1"})
    assert not logged()


@pytest.mark.commands  # a process imports torch
def test_a_front_end_asks_before_it_imports_anything() -> None:
    """Also where the import itself would fail with the old version.

    Every library of each front end is the old one in turn, in a fork of one process. That has
    imported torch, which every front end asks for first.
    """
    code = (
        "import importlib, os, sys, torch\n"
        "from ckpt import requirements\n"
        "from converters.errors import CheckpointError\n"
        "for case in sys.argv[1:]:\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0\n"
        "        continue\n"
        "    front_end, old = case.split()\n"
        "    requirements.version = lambda name: '0.1' if name == old else '99'\n"
        "    try:\n"
        "        importlib.import_module(front_end)\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n"
        "    loaded = {'transformers', 'accelerate', 'lightning', 'deepspeed'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
        "    sys.stdout.flush()\n"
        "    os._exit(0)  # the end of an interpreter with torch takes half a second\n"
    )
    cases = [(front_end, each) for front_end, names in FRONT_ENDS.items() for each in names]
    command = [sys.executable, "-c", code, *map(" ".join, cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{front_end} needs {library} {requirements.OLDEST[library]} or newer, and 0.1 is "
        f"installed; pip install '{library}>={requirements.OLDEST[library]}'"
        for front_end, library in cases
    ]


def test_the_oldest_python_can_parse_every_module() -> None:
    match = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert match is not None
    for package in ("ckpt", "converters"):
        for path in (ROOT / package).rglob("*.py"):
            ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, int(match[1])))


def test_the_classifiers_name_every_python_that_ci_runs() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert named == [f"3.{minor}" for minor in range(10, 15)]
    assert all(f'"{python}"' in workflow for python in named)


def test_the_oldest_rows_of_the_matrix_have_the_lower_bounds() -> None:
    path = ROOT / "scripts/matrix/run_matrix.py"
    spec = spec_from_file_location("run_matrix", path)
    assert spec is not None and spec.loader is not None
    matrix = sys.modules["run_matrix"] = module_from_spec(spec)
    spec.loader.exec_module(matrix)
    oldest = {row.name: row.versions for row in matrix.ROWS}
    bounds = {**requirements.OLDEST, **requirements.OLDEST_BESIDES}
    del bounds["pytorch_lightning"]
    rows = [oldest["torch 2.4" if name == "torch" else "oldest"] for name in bounds]
    found = [row[name] for name, row in zip(bounds, rows, strict=True)]
    assert [*map(requirements.numbers, found)] == [*map(requirements.numbers, bounds.values())]


def test_without_torch_every_public_name_says_that_it_needs_it() -> None:
    """Nobody sees an import of ckpt's own that failed; what needs no torch works."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import ckpt\n"
        f"source = {str(ROOT / 'fixtures/zero2-bf16-w2')!r}\n"
        "works = lambda: ckpt.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(source)\n"
        "assert not hasattr(ckpt, 'live')\n"
        "names = {name: lambda name=name: getattr(ckpt, name) for name in dir(ckpt)}\n"
        "modules = ('ckpt.trainers.hf', 'ckpt.trainers.accelerate', 'ckpt.trainers.lightning')\n"
        "names |= {name: lambda name=name: __import__(name) for name in modules}\n"
        "for name, use in {**names, 'zero_to_fp32.get': works}.items():\n"
        "    try: use()\n"
        "    except ckpt.CheckpointError as error: print(name, error.kind, error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True
    )
    lines = output.stdout.decode().splitlines()
    assert {line.split()[0] for line in lines} == {
        *("Preemption", "Saver", "resume", "live", "zero_to_fp32.get"),
        *("ckpt.trainers.hf", "ckpt.trainers.accelerate", "ckpt.trainers.lightning"),
    }
    assert all("needs torch, and it is not installed; pip install torch" in line for line in lines)
