"""The wheel has all packages and tables, and converts with what it requires and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import tomllib
from oracles import FIXTURES, ROOT, load_file, same
from packaging.requirements import Requirement

PACKAGES = ("ckpt", "converters")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, by the setuptools that is installed, from what git would clone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = source / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = wheels.iterdir()
    return path


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(PACKAGES)}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in packed if ".dist-info/" not in name} == expected


def required(name: str, seen: dict[str, Distribution]) -> None:
    """Adds to ``seen`` an installed distribution and all that it requires, without extras."""
    if name in seen:
        return
    seen[name] = distribution(name)
    for line in seen[name].requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required(requirement.name, seen)


def test_it_converts_a_checkpoint_in_an_environment_with_nothing_else(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    seen: dict[str, Distribution] = {}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        required(Requirement(line).name, seen)
    assert "torch" not in seen
    for installed in seen.values():
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
    python = tmp_path / "venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "check": True, "timeout": 300}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*install, "--no-deps", str(wheel)], **run)
    source, model = FIXTURES / "trainer-zero3/checkpoint-2", tmp_path / "model"
    absent = "import importlib.util as u; assert not u.find_spec('torch'); import ckpt; print(ckpt)"
    told = subprocess.run([python, "-c", absent], **run, capture_output=True, text=True).stdout
    assert str(site) in told
    subprocess.run([python.with_name("ckpt"), "to-fp32", source, "-o", model], **run)

    truth = load_file(FIXTURES / "trainer-zero3/live.safetensors")
    made = load_file(model / "model.safetensors")
    assert made and all(same(value, truth[f"fp32/{name}"]) for name, value in made.items())
