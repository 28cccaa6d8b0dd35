"""The command: exit codes, what goes to stdout and what to stderr, help, plans, facts."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from oracles import FIXTURES, ROOT, run

from ckpt.cli.main import SECTIONS, commands

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"


def test_python_m_ckpt_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("ckpt, version ")


def test_a_command_needs_no_stdin_and_no_stderr(tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m ckpt to-fp32 "{SOURCE}" -o "{tmp_path}/model" <&- 2>&-'
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "verified: " in done.stdout
    assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["to-fp32"], "Missing argument"),
        (["to-fp32", "x", "--dtype", "int8"], "int8"),
        (["to-fp32", "x", "--max-shard-size", "much"], "not a size"),
        (["to-fp32", "x", "--max-shard-size", "0GB"], "at least one byte"),
        (["to-fp64"], "No such command"),
    ],
)
def test_bad_usage_exits_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*args, code=2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["to-fp32", "show"])
def test_every_command_explains_itself_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, "--help")
    said = capsys.readouterr().out
    assert f"ckpt {command} out" in said
    options = [p for p in commands()[command].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


def test_an_error_is_json_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run("show", "nowhere", "--json", code=1)
    said = capsys.readouterr()
    assert json.loads(said.err) == {
        "schema": 1,
        "error": "nowhere does not exist; expected the folder of a checkpoint",
        "kind": "absent",
    }
    assert said.out == ""


def test_an_error_of_the_system_is_json_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "out/latest")

    monkeypatch.setattr("ckpt.weights.conversion.sources.fp32", fail)
    run("show", SOURCE, "--json", code=1)
    assert json.loads(capsys.readouterr().err) == {
        "schema": 1,
        "error": "out/latest: Permission denied",
        "kind": "system",
    }
    run("show", SOURCE, code=1)
    assert capsys.readouterr().err == "ckpt: out/latest: Permission denied\n"


def test_stdout_is_the_folder_and_one_line_of_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", SOURCE, "-o", tmp_path / "m")
    said = capsys.readouterr()
    folder, proof, verdict = said.out.splitlines()
    assert verdict
    assert folder == str(tmp_path / "m")
    assert proof.startswith("verified: ") and "20 tensors equal to model states" in proof
    assert said.err == ""
    run("to-fp32", SOURCE, "-o", tmp_path / "n", "--no-verify")
    assert "not verified" in capsys.readouterr().out


def test_json_is_what_the_record_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("to-fp32", SOURCE, "-o", tmp_path / "m", "--json")
    facts = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert facts["output"] == str(tmp_path / "m") and facts["checks"]["verified"]
    assert facts["weight_bytes"] == record["total_size"] and facts["missing"] == record["absent"]
    assert facts["files"] == [as_listed(file) for file in record["files"]]
    assert facts["source"]["files"] == [as_listed(file) for file in record["source"]["files"]]
    assert record["checks"].items() <= facts["checks"].items()
    others = record.keys() - {"total_size", "absent", "files", "source", "checks"}
    assert {key: facts[key] for key in others} == {key: record[key] for key in others}


def as_listed(file: dict[str, Any]) -> dict[str, Any]:
    """A file of conversion.json, which calls its bytes size, under the keys of --json."""
    return {"bytes" if key == "size" else key: value for key, value in file.items()}


def test_a_dry_run_foretells_what_is_written_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["to-fp32", SOURCE, "-o", tmp_path / "m", "--max-shard-size", "5KB"]
    run(*args, "--dry-run")
    text = capsys.readouterr().out
    assert "model-00001-of-0000" in text and "memory" in text and "free" in text
    run(*args, "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    run(*args, "--json")
    done = json.loads(capsys.readouterr().out)
    assert plan["files"] == done["files"] and plan["weight_bytes"] == done["weight_bytes"]
    made = {p.name: p.stat().st_size for p in (tmp_path / "m").iterdir()}
    for name in (*plan["copied_files"], *(file["name"] for file in plan["files"])):
        assert name in made
    own = made["conversion.json"] + made["config.json"]
    assert plan["write_bytes"] == sum(made.values()) - own


def test_show_tells_what_a_checkpoint_is(capsys: pytest.CaptureFixture[str]) -> None:
    run("show", SOURCE, "--json", "--tensors")
    facts = json.loads(capsys.readouterr().out)
    expected = {"stage": 2, "world_size": 2, "precision": "bf16", "step": 2, "deepspeed": "0.19.8"}
    assert expected.items() <= facts.items()
    assert facts["parameters"] == 4944 and facts["missing"] == {}
    assert facts["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert facts["tensors_by_name"]["model.norm.weight"] == {"dtype": "F32", "shape": [16]}
    run("show", SOURCE)
    text = capsys.readouterr().out
    assert "ZeRO stage   2" in text and "4,944 in 20 tensors" in text


@pytest.mark.parametrize("tag", ["global_step2"])
def test_a_tag_folder_a_save_dir_and_a_trainer_folder_are_the_same(
    tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for args in ([SOURCE], [SOURCE / tag], [SOURCE, "--tag", tag], [SOURCE / tag, "--tag", tag]):
        run("show", *args, "--json")
        facts = json.loads(capsys.readouterr().out)
        seen.append({key: value for key, value in facts.items() if key != "folder"})
    assert all(facts == seen[0] for facts in seen)


def test_the_table_of_commands_is_what_the_modules_have() -> None:
    for title, names in SECTIONS.items():
        for name, module in names.items():
            in_module = import_module(f"ckpt.cli.{module}").COMMANDS
            assert name in [command.name for command in in_module], (title, name)
    loaded = {module for names in SECTIONS.values() for module in names.values()}
    in_modules = [c.name for m in loaded for c in import_module(f"ckpt.cli.{m}").COMMANDS]
    assert sorted(in_modules) == sorted(commands())
