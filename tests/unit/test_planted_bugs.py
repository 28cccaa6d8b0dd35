"""A bug of ours comes out as itself, from every reader and command, never as a damaged file."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from oracles import FIXTURES, run
from run_folders import commit

import ckpt
from ckpt.cli.main import cli
from ckpt.hub import journal
from ckpt.state import plain
from converters import quantized
from converters.execute.virtual_file import Serving
from converters.formats import safetensors
from converters.plan import Plan

STAGE_2, STAGE_3 = FIXTURES / "zero2-bf16-w2", FIXTURES / "zero3-bf16-w2"
STAGE_0 = FIXTURES / "zero0-bf16"
QUANTIZED = FIXTURES / "quantized/bitsandbytes-nf4-double-uint8.safetensors"
BUGS = (KeyError("planted"), ValueError("planted"), TypeError("planted"), IndexError("planted"))
# a command, and a function that does its work; each is replaced by one that has a bug
COMMANDS = {
    "show: pickles": (("show", STAGE_2), "converters.torch_files.views._runs"),
    "show: the machine": (("show", STAGE_2), "converters.pickles.machine.denylist.reaches"),
    "show: zips": (("show", STAGE_2), "converters.torch_files.zip_format.pairwise"),
    "show: assembling": (("show", STAGE_2), "converters.zero.checkpoint.assemble"),
    "show: stage 0": (("show", STAGE_0), "converters.zero.stage0.name_matching.assign"),
    "show: stage 2": (("show", STAGE_2), "converters.zero.stage12.flat_groups"),
    "show: stage 3": (("show", STAGE_3), "converters.zero.stage3._sub_groups"),
    "show: files": (("show", STAGE_2), "converters.zero.files.state_files.shapes"),
    "to-fp32": (("to-fp32", STAGE_3, "-n"), "converters.zero.partitioning.stage3"),
    "to-fp32: plan": (("to-fp32", STAGE_2, "-n"), "converters.formats.safetensors._shard"),
    "to-fp32: 16 bits": (
        ("to-fp32", STAGE_2, "-n", "--weights", "16bit"),
        "converters.zero.weights_16bit._trained_names",
    ),
    "reshard": (
        ("reshard", STAGE_2, "--world-size", "3", "-n"),
        "converters.zero.partitioning.partition_group",
    ),
    "reshard: groups": (
        ("reshard", STAGE_3, "--world-size", "3", "-n"),
        "converters.zero.rank_vectors._state_vectors",
    ),
    "to-universal": (("to-universal", STAGE_2, "-n"), "converters.zero.universal.plan.common"),
    "to-universal: files": (
        ("to-universal", STAGE_3, "-n"),
        "converters.torch_files.file_plan.entries",
    ),
    "from-universal": (
        ("from-universal", "UNIVERSAL", "--world-size", "3", "-n"),
        "converters.zero.universal.parameter_folders._tensor",
    ),
    "from-universal: plan": (
        ("from-universal", "UNIVERSAL", "--world-size", "3", "-n"),
        "converters.zero.native.optimizer_files._base_state",
    ),
    "verify": (("verify", "COMMITTED"), "ckpt.runs.fields.require_kinds"),
    "verify: files": (("verify", "COMMITTED"), "ckpt.runs.manifest.is_of_size"),
    "verify: without ckpt": (("verify", STAGE_2), "converters.torch_files.views._runs"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A universal folder, and a checkpoint that was committed."""
    work = tmp_path_factory.mktemp("planted")
    run("to-universal", STAGE_2, "-o", work / "universal")
    shutil.copytree(STAGE_2, work / "run/checkpoint-2")
    commit(work / "run/checkpoint-2", 2)
    return {"UNIVERSAL": work / "universal", "COMMITTED": work / "run/checkpoint-2"}


def plant(monkeypatch: pytest.MonkeyPatch, target: str, bug: Exception) -> None:
    """Replaces a function by one that raises."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise bug

    parts = target.split(".")
    depth = len(parts) - 1
    while depth:
        try:
            owner: Any = importlib.import_module(".".join(parts[:depth]))
            break
        except ModuleNotFoundError:
            depth -= 1
    for name in parts[depth:-1]:
        owner = getattr(owner, name)
    assert callable(getattr(owner, parts[-1]))
    monkeypatch.setattr(owner, parts[-1], fail)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize("case", COMMANDS)
def test_a_bug_of_ours_comes_out_of_a_command_as_itself(
    case: str,
    bug: Exception,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, target = COMMANDS[case]
    words = [str(folders.get(str(argument), argument)) for argument in arguments]
    if "-n" in words:
        words[words.index("-n")] = "--dry-run"
        words += ["-o", str(tmp_path / "out")]
    plant(monkeypatch, target, bug)
    with pytest.raises(type(bug)) as error:
        cli.main(args=words, prog_name="ckpt", standalone_mode=False)
    assert error.value is bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize(
    "target",
    [
        "converters.formats.safetensors._cover",
        "converters.storage.bounded_json._unique_names",
    ],
)
def test_a_bug_of_ours_comes_out_of_open_as_itself(
    target: str, bug: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bounded_json" in target and isinstance(bug, ValueError):
        return  # what json.loads itself raises is a ValueError: it is the call that interprets
    plant(monkeypatch, target, bug)
    with pytest.raises(type(bug)) as error:
        ckpt.open(QUANTIZED)
    assert error.value is bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize(
    "target",
    [
        "converters.zero.optimizer_state._with_states",
        "converters.zero.optimizer_state._flattened",
    ],
)
def test_a_bug_of_ours_comes_out_of_the_optimizers_state_as_itself(
    target: str, bug: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ckpt.open(STAGE_2) as weights:
        plant(monkeypatch, target, bug)
        with pytest.raises(type(bug)) as error:
            weights.optimizer_state("embed.weight")
    assert error.value is bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_of_ours_comes_out_of_a_recipe_as_itself(
    bug: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = safetensors.read(QUANTIZED)
    groups = quantized.groups(weights)
    plant(monkeypatch, "converters.quantized.small.entry", bug)
    with pytest.raises(type(bug)) as error:
        quantized.recipes(weights, groups)
    assert error.value is bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_of_ours_comes_out_of_a_ranks_state_as_itself(
    bug: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = plain.dumps({"a": [1, 2.5]})
    plant(monkeypatch, "ckpt.state.plain_reading._container", bug)
    with pytest.raises(type(bug)) as error:
        plain.loads(data)
    assert error.value is bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_of_ours_comes_out_of_the_journal_of_a_push_as_itself(
    bug: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = Plan((), None, 0)
    serving = Serving(plan)
    journal.opened(plan, serving).prove(serving)
    assert journal.opened(plan, serving).proven
    plant(monkeypatch, "ckpt.hub.journal._read", bug)
    with pytest.raises(type(bug)) as error:
        journal.opened(plan, serving)
    assert error.value is bug


def test_the_command_calls_a_bug_a_bug_and_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "converters.zero.checkpoint.assemble", KeyError("planted"))
    run("show", STAGE_2, code=1)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Traceback (most recent call last):")
    assert "KeyError: 'planted'" in err
    last = err.splitlines()[-1]
    assert last.startswith("ckpt: KeyError: this is a bug of ckpt ")
    assert last.endswith("; please report it with the lines above")


def test_a_bug_is_json_where_json_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "converters.zero.checkpoint.assemble", KeyError("planted"))
    run("show", STAGE_2, "--json", code=1)
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["kind"] == "bug" and "please report it" in last["error"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory ran out: "),
        (MemoryError("Unable to allocate 2.33 TiB"), "memory ran out (Unable to allocate 2.33 TiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out: "),
        (ImportError("x.so: failed to map segment from shared object"), "memory ran out: "),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), "a/b: Too many open files: raise "),
        (OSError(errno.ENOSPC, "No space left", "a/b"), "a/b: No space left: make room there"),
    ],
)
def test_a_machine_that_runs_out_of_something_is_no_bug(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, "converters.zero.checkpoint.assemble", error)
    run("show", STAGE_2, code=1)
    said = capsys.readouterr().err
    assert said.startswith(f"ckpt: {words}") and said.count("\n") == 1
