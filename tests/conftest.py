"""The environment that DeepSpeed needs on a machine without a GPU, set before it is imported."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import extensions
import pytest

from ckpt.runs.foreign import liveness

if TYPE_CHECKING:
    from faults.forks import Forks

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(extensions.environment())
# A build that was killed leaves a lock on which every later run would wait for ever.
for _lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
    if time.time() - _lock.stat().st_mtime > 900:
        _lock.unlink(missing_ok=True)


_HERE = Path(__file__).parent
_LONGEST = (  # the modules that take a minute and more, by what was measured
    *("hf", "resume", "saver", "same_run", "lightning", "accelerate", "places", "topology"),
    *("launchers", "live", "adapters_training", "reshard_training", "engines", "errors"),
    *("faults", "hardening_hub", "hardening_differential", "hardening_hostile", "hardening_crash"),
)


# Read the syntax trees of all modules: one process parses them for all of these tests.
_OF_SYNTAX = {
    f"test_{name}.py"
    for name in (
        *("architecture", "catches", "collection", "console", "engine_attributes", "imports"),
        *("messages", "naming", "options"),
    )
}

# What takes longest comes first, so that the processes of xdist end together; the many small tests
# come last, and alone of all may go to any process in parts of a module. Not one by one: for every
# test that ends the scheduler counts through all parts that it ever sent.
_ROOMS = ("training", "hardening", "hub", "oracle", "commands", "unit")
_SMALL = ("tests/commands/", "tests/unit/")
_PARTS = 16  # of a module of small tests
_TOGETHER = {"test_systems.py"}  # but of these: what they share takes long to start


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the order below: xdist would begin with the modules that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[object]:
    """Collects without the garbage collector, as modules and items are no garbage.

    It would walk over all of them again and again, now and in each test; ``freeze`` spares that.
    """
    gc.disable()
    try:
        if session.config.option.markexpr != "unit":
            _import_share(session.config)
        return (yield)  # type: ignore[misc]
    finally:
        gc.freeze()
        gc.enable()


def _import_share(config: pytest.Config) -> None:
    """Imports the share of a process of xdist in all test modules, before it imports the others.

    So each module's assertions are rewritten and compiled by one process, 8 s of a core in all, and
    not by every process at the same time. What cannot be imported fails when it is collected.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return

    paths = sorted(path for room in _ROOMS for path in (_HERE / room).glob("test_*.py"))
    first = int(worker["workerid"].removeprefix("gw"))
    for path in paths[first :: worker["workercount"]]:
        sys.path.insert(0, str(path.parent))
        with suppress(Exception, pytest.skip.Exception):
            importlib.import_module(path.stem)
        sys.path.remove(str(path.parent))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Sends a module, and so what its fixtures train, to one process, but for small tests.

    ``xdist_group`` does not do it: with pytest 9.2, xdist 3.8 writes the group where nobody reads
    it, and each process trains all over again.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            if Path(module).name in _OF_SYNTAX:
                return "syntax"
            if not module.startswith(_SMALL) or Path(module).name in _TOGETHER:
                return module
            return f"{module} {crc32(nodeid.encode()) % _PARTS}"

    return ByModule(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m unit`` no other room is imported: transformers alone would take seconds."""
    is_other_room = collection_path.parent == _HERE and collection_path.name in _ROOMS[:-1]
    return True if config.option.markexpr == "unit" and is_other_room else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test the mark of its room, the folder under tests/ that it lies in.

    A test that costs more than its module has the mark of another room by hand.
    """
    for item in items:
        if not any(mark.name in _ROOMS for mark in item.iter_markers()):
            item.add_marker(_room(item.path))
    items.sort(key=lambda item: _order(item.path))


@cache
def _room(path: Path) -> str:
    folder = path.relative_to(_HERE).parts[0]
    return folder if folder in _ROOMS else "unit"


@cache
def _order(path: Path) -> tuple[int, int]:
    name = path.stem.removeprefix("test_")
    place = _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)
    return place, _ROOMS.index(_room(path))


@pytest.fixture(autouse=True)
def _second_looks_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not wait to see whether somebody writes a checkpoint.

    Nearly every checkpoint of a test is younger than a minute. Commands in processes of their own
    wait as they do for a user.
    """
    monkeypatch.setattr(liveness, "PAUSE", 0.02)


@pytest.fixture(autouse=True)
def _nothing_is_synced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not wait for the disk.

    Which files are synced, and what comes of it where the disk fails, is for the tests of hardening
    and of training: their processes sync.
    """
    if _room(request.node.path) in ("unit", "commands", "oracle", "hub"):
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A test that leaves a process group makes later ones of its process fail: it is named."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("a process group was left initialised")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """``ckpt`` as forks of a process that has imported it, which can be made to fail or die."""
    from faults.forks import Forks  # which only Linux has

    with Forks() as warm_forks:
        yield warm_forks


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the library has logged since the last call, INFO included."""
    caplog.set_level(logging.INFO, "ckpt")

    def read() -> str:
        text = caplog.text
        caplog.clear()
        return text

    return read
