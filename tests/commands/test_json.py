"""The JSON of every command: docs/json.md, the types of results, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from json_table import Row, require_documented, table
from oracles import FIXTURES, run
from run_folders import real

from ckpt import results
from ckpt.cli.main import commands
from ckpt.cli.results import checkpoints, conversion, hub, inspection, runs, shares, upkeep
from ckpt.results import FileEntry
from ckpt.rewrite.result import RewriteResult

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"
RESULTS: dict[str, tuple[type, ...]] = {
    "show": (checkpoints.ShowResult,),
    "stats": (inspection.StatsResult,),
    "diff": (inspection.DiffResult,),
    "to-fp32": (conversion.ConversionResult, shares.ShareResult),
    "reshard": (RewriteResult, shares.ShareResult),
    "to-universal": (RewriteResult, shares.ShareResult),
    "from-universal": (RewriteResult, shares.ShareResult),
    "to-dcp": (RewriteResult, shares.ShareResult),
    "from-dcp": (RewriteResult, shares.ShareResult),
    "join": (shares.JoinResult,),  # or what the command prints whose shares it joins
    "ls": (runs.ListResult,),
    "latest": (runs.LatestResult,),
    "verify": (runs.VerifyResult,),
    "prune": (runs.PruneResult,),
    "pin": (runs.PinResult,),
    "unpin": (runs.PinResult,),
    "doctor": (upkeep.DoctorResult, upkeep.AdoptResult),
    "slim": (upkeep.SlimResult,),
    "collect": (upkeep.CollectResult,),
    "push": (hub.PushPreview, hub.PushResult),
    "pull": (hub.PullResult,),
}
EVERYWHERE = {"schema", "ckpt"}
CASES = (
    "show {source} --tensors",
    "show {fixtures}/zero3-bf16-w2",
    "stats {source} --histogram",
    "diff {source} {fixtures}/trainer-zero2/checkpoint-2",
    "to-fp32 {source} -o {out}/model --dry-run",
    "to-fp32 {source} -o {out}/model",
    "reshard {source} --world-size 3 -o {out}/w3 --dry-run",
    "reshard {source} --world-size 3 -o {out}/w3",
    "to-universal {source} -o {out}/u",
    "from-universal {out}/u --world-size 1 -o {out}/w1",
    "to-dcp {source} -o {out}/dcp",
    "from-dcp {out}/dcp --world-size 3 --stage 3 -o {out}/native",
    "ls {run}",
    "latest {run}",
    "latest {run} --set checkpoint-2 --dry-run",
    "verify {run}",
    "prune {run} --keep-last 1 --dry-run",
    "prune {run} --keep-last 1",
    "pin {run}/checkpoint-4 --dry-run",
    "pin {run}/checkpoint-4",
    "unpin {run}/checkpoint-4",
    "doctor {run} --fix --dry-run",
    "doctor {run} --adopt --dry-run",
    "slim {run}/checkpoint-4 --force --dry-run",
    "collect {run}/checkpoint-4 -o {out}/joined --dry-run",
)


def inner_results(hint: Any) -> Iterator[type]:
    """The dataclasses that a type holds."""
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        yield hint
    for argument in get_args(hint):
        yield from inner_results(argument)


def kind(hint: Any) -> str:
    """How the table calls the JSON of a type; null aside."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple:
        return "list"
    if get_origin(hint) is Mapping:
        return "map"
    if dataclasses.is_dataclass(hint):
        return "object"
    return {str: "text", Path: "text", int: "number", float: "number", bool: "true, false"}[hint]


def keys_of(result: type) -> Iterator[tuple[str, str]]:
    """The keys of a result and of what is in it, each with its type."""
    hints = get_type_hints(result)
    for field in dataclasses.fields(result):
        key = "bytes" if field.name == "nbytes" else field.name
        yield key, kind(hints[field.name])
        for inner in inner_results(hints[field.name]):
            yield from keys_of(inner)


def test_the_table_has_every_key_of_every_command_and_no_other() -> None:
    rows: dict[str, tuple[set[str], set[str]]] = {}
    for command, kinds in RESULTS.items():
        for result in kinds:
            for key, name in keys_of(result):
                entry = rows.setdefault(key, (set(), set()))
                entry[0].add(name)
                entry[1].add(command)
    expected = {key: Row(frozenset(a), frozenset(b)) for key, (a, b) in rows.items()}
    in_docs = table()
    assert {key: in_docs.get(key) for key in expected} == expected
    assert in_docs.keys() == expected.keys()


def test_a_key_has_one_type() -> None:
    assert {key: row.kinds for key, row in table().items() if len(row.kinds) > 1} == {}


def test_every_command_that_has_json_is_in_the_table() -> None:
    with_json = {
        name
        for name, command in commands().items()
        if any(parameter.name == "as_json" for parameter in command.params)
    }
    assert with_json == RESULTS.keys() == set(commands())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the cases name: a run of two checkpoints, and a folder for what they make."""
    out = tmp_path_factory.mktemp("json")
    for step in (2, 4):
        real(out / "run", step, {"eval_loss": float("nan")})
    shutil.copytree(SOURCE, out / "run/checkpoint-6")
    return {"source": SOURCE, "fixtures": FIXTURES, "out": out, "run": out / "run"}


def test_what_the_commands_print_is_what_the_table_says(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for case in CASES:
        command, *arguments = case.format_map(folders).split()
        failing = command == "doctor" and "--fix" in arguments
        run(command, *arguments, "--json", code=int(failing))
        document = json.loads(capsys.readouterr().out)

        require_documented(command, document)
        if "--dry-run" in arguments:
            assert document["dry_run"] is True, case


def test_what_json_cannot_hold_is_text() -> None:
    @dataclasses.dataclass
    class Measured:
        nbytes: int
        path: Path
        values: dict[str, float]
        files: tuple[FileEntry, ...]

    values = {"x": float("nan"), "y": -float("inf")}
    measured = Measured(3, Path("a/b"), values, (FileEntry("f", 1),))
    assert results.document(measured) == {
        "schema": 1,
        "ckpt": results.__version__,
        "bytes": 3,
        "path": "a/b",
        "values": {"x": "nan", "y": "-inf"},
        "files": [{"name": "f", "bytes": 1}],
    }


def test_commands_that_write_or_delete_have_a_dry_run() -> None:
    reading = {"show", "stats", "diff", "ls", "verify"}
    for name, command in commands().items():
        options = {flag for parameter in command.params for flag in parameter.opts}
        assert ("--dry-run" in options) == (name not in reading), name


def test_the_help_of_ckpt_cuts_no_line_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("-h")
    lines = capsys.readouterr().out.splitlines()
    for name, command in commands().items():
        (line,) = (line for line in lines if re.match(rf"  {name} ", line))
        assert line.endswith(str(command.short_help)) and len(line) <= 80, line
    heads = ["Weights:", "Training states:", "Runs:", "Hugging Face Hub:"]
    assert [line for line in lines if line in heads] == heads
