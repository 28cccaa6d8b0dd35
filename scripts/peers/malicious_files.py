"""Files that run code when they are unpickled, of picklescan's tests: ckpt opens none of them.

Each is opened as it is, and under the names of files that ckpt reads. Nothing it names may be
run, which an audit hook of Python watches, and nothing may come out but a CheckpointError or
tensors.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import ckpt

FOLDER = Path(os.environ["PEERS_FOLDER"])
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".py")
NAMES = ("", "pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.safetensors")
RUNS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "exec", "socket.connect"}
events: list[str] = []
watching: list[bool] = []


def _watch(event: str, _arguments: object) -> None:
    if watching and event in RUNS:
        events.append(event)


sys.addaudithook(_watch)


def opened(path: Path) -> None:
    """Opens a file and reads what is in it."""
    try:
        with ckpt.open(path, "np") as weights:
            for name in weights:
                weights[name]
    except ckpt.CheckpointError:
        pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_run(path: Path, name: str, tmp_path: Path) -> None:
    place = tmp_path / (name or path.name)
    shutil.copy(path, place)
    opened(place)  # once, so that all modules are there
    events.clear()
    watching.append(True)
    try:
        opened(place)
    finally:
        watching.clear()

    assert events == []
