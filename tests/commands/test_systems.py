"""macOS and Windows: reading and converting work there, and what needs locks says so.

On Linux they are imitated (``other_systems``); on macOS and Windows themselves, where the workflow
in .github runs this module, the same commands run as they are.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import FIXTURES, PYTHONPATH, ROOT
from safetensors.numpy import load_file
from syntax_trees import nodes

import ckpt
from ckpt.cli.main import main
from ckpt.folders.filenames import MANIFEST
from ckpt.hub.content import items
from ckpt.runs import fields
from ckpt.runs.upkeep import adoption
from converters.errors import CheckpointError
from converters.formats import shard_index
from converters.storage.system import names

IMITATED = sys.platform == "linux"
IMITATED_SYSTEMS = ("macos", "windows") if IMITATED else ()
SYSTEMS = IMITATED_SYSTEMS or (sys.platform,)
Run = Callable[..., subprocess.CompletedProcess[str]]
NEEDS_LOCKS = (
    "needs locks of files (flock), which this system does not have; use it on Linux, macOS or the "
    "Windows Subsystem for Linux"
)
MODULES = sorted(path for name in ("ckpt", "converters") for path in (ROOT / name).rglob("*.py"))


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """``ckpt`` on the system, or Python ``code`` there, which ends with ``fails``."""
    with ExitStack() as stack:
        imitations = {system: stack.enter_context(imitation(system)) for system in IMITATED_SYSTEMS}

        def run_there(
            system: str, *args: object, folder: Path, fails: int = 0, code: str = ""
        ) -> subprocess.CompletedProcess[str]:
            if IMITATED:
                done = imitations[system].run(args, folder, code)
            else:
                done = here(args, folder, code)
            assert done.returncode == fails, done.stdout + done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            return done

        yield run_there


def imitation(system: str) -> Any:
    from imitations import Imitation  # which only Linux has

    return Imitation(system)


def here(args: Sequence[object], folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """On macOS and Windows themselves, as processes."""
    start = ["-c", code] if code else ["-m", "ckpt"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *start, *map(str, args)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def plainly(*args: object, folder: Path) -> None:
    """``ckpt`` on this system, in this process."""
    with chdir(folder), pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    assert not end.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "conversion.json"  # it says when, and by which command
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run with two committed checkpoints."""
    for step in (1, 2):
        checkpoint = tmp_path / f"out/checkpoint-{step}"
        shutil.copytree(FIXTURES / "trainer-zero3/checkpoint-2", checkpoint)
        manifest = adoption.commit(checkpoint)
        (checkpoint / MANIFEST).write_bytes(replace(manifest, step=step).dumps())
    return tmp_path / "out"


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("source", ["trainer-zero2/checkpoint-2", "trainer-zero3/checkpoint-2"])
def test_a_conversion_makes_the_same_bytes(
    run: Run, system: str, source: str, tmp_path: Path
) -> None:
    folder, options = FIXTURES / source, ("--dtype", "bf16", "--max-shard-size", "8KB")
    run(system, "to-fp32", folder, "-o", "model", *options, folder=tmp_path)
    if IMITATED:
        plainly("to-fp32", folder, "-o", "expected", *options, folder=tmp_path)
        assert contents(tmp_path / "model") == contents(tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_values_are_those_of_the_live_engine(run: Run, system: str, tmp_path: Path) -> None:
    source = FIXTURES / "zero3-fp32-w2"
    live = {
        name.removeprefix("fp32/"): value
        for name, value in load_file(source / "live.safetensors").items()
        if name.startswith("fp32/")
    }
    run(system, "to-fp32", source, "-o", "model", folder=tmp_path)
    weights = load_file(tmp_path / "model/model.safetensors")
    assert live
    assert all(np.array_equal(weights[name], value) for name, value in live.items())


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_output_is_replaced(run: Run, system: str, tmp_path: Path) -> None:
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    for dtype in ("fp32", "bf16", "bf16"):
        options = ("-o", "model", "--dtype", dtype, "--overwrite")
        run(system, "to-fp32", source, *options, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    config = json.loads((tmp_path / "model/config.json").read_text("utf-8"))
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_that_read_work(run: Run, system: str, out: Path) -> None:
    checkpoint = out / "checkpoint-2"
    shown = json.loads(run(system, "show", checkpoint, "--json", folder=out).stdout)
    assert shown["stage"] == 3
    listed = json.loads(run(system, "ls", out, "--json", folder=out).stdout)
    assert [entry["step"] for entry in listed["checkpoints"]] == [1, 2]
    assert run(system, "latest", out, folder=out).stdout == f"{checkpoint}\n"
    verified = json.loads(run(system, "verify", out, "--data", "--json", folder=out).stdout)
    assert all(entry["whole"] for entry in verified["checkpoints"])

    damaged = next(checkpoint.glob("global_step*/*_optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    run(system, "verify", out, "--data", folder=out, fails=1)


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_opened_checkpoint_reads_its_tensors(run: Run, system: str, tmp_path: Path) -> None:
    code = (
        "import sys, ckpt, hashlib\n"
        "with ckpt.open(sys.argv[1], framework='np') as opened:\n"
        "    for name in sorted(opened):\n"
        "        print(name, hashlib.sha256(opened[name].tobytes()).hexdigest())\n"
    )
    source = FIXTURES / "trainer-zero3/checkpoint-2"
    lines = run(system, source, folder=tmp_path, code=code).stdout.splitlines()
    assert len(lines) == 21
    if IMITATED:
        with ckpt.open(source, framework="np") as opened:
            tensors = {name: np.asarray(opened[name]) for name in sorted(opened)}
        expected = [
            f"{name} {hashlib.sha256(tensor.tobytes()).hexdigest()}"
            for name, tensor in tensors.items()
        ]
        assert lines == expected


@pytest.mark.parametrize("system", SYSTEMS)
def test_states_are_resharded(run: Run, system: str, tmp_path: Path) -> None:
    source = FIXTURES / "zero2-bf16-w2"
    run(system, "reshard", source, "--world-size", "3", "-o", "three", folder=tmp_path)
    run(system, "to-universal", source, "-o", "universal", folder=tmp_path)
    ranks = ("--world-size", "2", "-o")
    run(system, "from-universal", "universal", *ranks, "native", folder=tmp_path)
    run(system, "to-dcp", source, "-o", "dcp", folder=tmp_path)
    run(system, "from-dcp", "dcp", "--stage", "2", *ranks, "from-dcp", folder=tmp_path)
    for path in ("universal", "native", "dcp", "from-dcp"):
        run(system, "to-fp32", path, "-o", f"{path}-fp32", folder=tmp_path)
    if IMITATED:
        plainly("reshard", source, "--world-size", "3", "-o", "expected", folder=tmp_path)
        three, expected = contents(tmp_path / "three"), contents(tmp_path / "expected")
        assert three.keys() == expected.keys()
        assert all(data == expected[name] for name, data in three.items() if name.endswith(".pt"))


@pytest.mark.hub
@pytest.mark.skipif(not IMITATED, reason="the local Hub is made for Linux")
@pytest.mark.parametrize("system", SYSTEMS)
def test_checkpoints_and_models_are_pushed_and_pulled(
    system: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_server import hub

    folder = out.parent
    plainly("to-fp32", out / "checkpoint-2", "-o", "model", folder=folder)
    with hub(folder / "server") as server:
        for name, value in {**server.env(), "XDG_CACHE_HOME": str(folder / "cache")}.items():
            monkeypatch.setenv(name, value)
        with imitation(system) as there:
            for command in (
                *("push model org/model", "push out/checkpoint-2 org/checkpoint"),
                *("pull org/model pulled-model", "pull org/checkpoint pulled-checkpoint"),
            ):
                done = there.run(command.split(), folder)
                assert not done.returncode, done.stderr

    model = contents(folder / "model")
    for name in ("pulled-model", "pulled-checkpoint"):
        pulled = contents(folder / name)
        assert pulled["model.safetensors"] == model["model.safetensors"]


@pytest.mark.skipif(not IMITATED, reason="on the system itself only one of the two is there")
@pytest.mark.parametrize(
    ("command", "work"),
    [
        (("prune", "out", "--keep-last", "1"), "changing a checkpoint"),
        (("slim", "out/checkpoint-1", "--force"), "changing a checkpoint"),
        (("doctor", "out", "--fix"), "ckpt doctor --fix"),
        (("doctor", "out", "--adopt"), "ckpt doctor --adopt"),
    ],
)
def test_what_needs_locks_says_so_on_windows(
    run: Run, command: tuple[str, ...], work: str, out: Path
) -> None:
    before = contents(out)
    said = run("windows", *command, folder=out.parent, fails=1).stderr
    assert said == f"ckpt: {work} {NEEDS_LOCKS}\n"
    assert contents(out) == before


@pytest.mark.skipif(not IMITATED, reason="on the system itself only one of the two is there")
def test_a_run_is_pruned_on_macos(run: Run, out: Path) -> None:
    run("macos", "prune", out, "--keep-last", "1", folder=out)
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]


@pytest.mark.skipif(not IMITATED, reason="it is about the imitation")
def test_the_imitation_lacks_what_the_system_lacks(run: Run) -> None:
    code = (
        "import os, errno, ctypes\n"
        "assert not hasattr(os, 'posix_fadvise') and not hasattr(errno, 'EREMOTEIO')\n"
        "assert not os.path.exists('/proc/self/status')\n"
        "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n"
        "print(bool(fcntl), hasattr(os, 'pread'), hasattr(os, 'sync'), hasattr(os, 'getuid'))\n"
    )
    assert run("macos", folder=ROOT, code=code).stdout == "True True True True\n"
    assert run("windows", folder=ROOT, code=code).stdout == "False False False False\n"


def test_descriptors_are_opened_in_one_place() -> None:
    """Elsewhere a file would be opened as text on Windows."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) == ("os", "open")
    ]
    assert [call.partition(":")[0] for call in calls] == ["converters/storage/system/opening.py"]


def test_text_names_its_encoding() -> None:
    """Without one it is that of the machine, which is not UTF-8 on Windows."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in nodes(path)
        if isinstance(node, ast.Call) and _is_text_without_encoding(node)
    ]
    assert calls == []


def _is_text_without_encoding(call: ast.Call) -> bool:
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    match call.func:
        case ast.Attribute(attr="read_text"):
            return not call.args
        case ast.Attribute(attr="write_text"):
            return len(call.args) < 2
        case ast.Name(id="open"):
            mode = call.args[1] if len(call.args) > 1 else None
            mode = next((each.value for each in call.keywords if each.arg == "mode"), mode)
            is_bytes = (
                "b" in str(mode.value) if isinstance(mode, ast.Constant) else mode is not None
            )
            return not is_bytes and len(call.args) < 4
    return False


HOSTILE = (
    *("a\\b", "..\\a", "C:a", "C:\\a", "model.safetensors:stream"),
    *("nul", "CON.safetensors", "Aux .pt", "lpt1.tar.gz", "COM\u00b9", "model.", "model "),
)
FIT = ("null", "console.json", "com", "lpt10", "auxiliary.pt", ".nul", "model.safetensors")


@pytest.mark.parametrize("name", [*HOSTILE, "/a", "..", "a\0b"])
def test_no_name_leads_out_of_its_folder_on_windows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "FORBIDDEN", "/\0\\:")
    assert not names.is_name(name) and not fields.is_inside(f"folder/{name}")
    assert items.unfit(f"folder/{name}") is not None
    assert all(map(names.is_name, FIT))


def test_an_index_cannot_name_a_file_on_another_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "FORBIDDEN", "/\0\\:")
    for name in HOSTILE:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": name}}), "utf-8")
        with pytest.raises(CheckpointError, match="outside its folder"):
            shard_index.read(index)


def test_on_linux_such_names_are_those_of_files() -> None:
    assert all(names.is_name(name) for name in HOSTILE) == (sys.platform != "win32")


# What a training alone uses, below a question for the system.
OF_TRAININGS = {"ckpt/saving/host_copies.py: mmap.MADV_HUGEPAGE"}


@pytest.mark.skipif(not IMITATED, reason="the stubs are those of a development environment")
def test_what_other_systems_lack_is_asked_for_in_one_room() -> None:
    from other_systems import missing_names

    lacking = {
        name: missing_names(name, "windows") | missing_names(name, "macos")
        for name in ("os", "errno", "signal", "mmap", "time", "select", "socket")
    }
    uses = {
        f"{path.relative_to(ROOT).as_posix()}: {node.value.id}.{node.attr}"
        for path in MODULES
        if "system" not in path.parent.name
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in lacking.get(node.value.id, ())
    }
    assert uses == OF_TRAININGS
    modules = {
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in MODULES
        if "system" not in path.parent.name
        for node in nodes(path)
        if isinstance(node, ast.Import)
        for name in (alias.name for alias in node.names)
        if name in ("fcntl", "resource", "pwd", "grp", "termios", "syslog")
    }
    assert modules == set()
