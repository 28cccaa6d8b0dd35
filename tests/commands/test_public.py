"""What users import: seen by type checkers and by ``dir()``, and under older names too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from oracles import FIXTURES, ROOT

import ckpt

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"
# What a type checker has to say of each, in short.
TYPES = {
    "ckpt.Saver": "ckpt.saving.saver.Saver",
    "ckpt.Retention": "ckpt.runs.retention.Retention",
    "ckpt.Preemption": "ckpt.saving.preemption.Preemption",
    "ckpt.Push": "ckpt.hub.background.Push",
    "ckpt.CheckpointError": "converters.errors.CheckpointError",
    "ckpt.open": "def (path:",
    "ckpt.resume": "def (engine:",
    "ckpt.find": "def (path:",
    "ckpt.to_fp32": "-> ckpt.weights.conversion.to_fp32.ConvertedModel",
    "ckpt.convert.plan": "-> ckpt.weights.conversion.task.Conversion",
    "ckpt.reshard.plan": "-> ckpt.rewrite.job.Rewriting",
    "ckpt.reshard.execute": "-> ckpt.rewrite.result.RewriteResult",
    "ckpt.universal.plan_to": "-> ckpt.rewrite.job.Rewriting",
}


@pytest.mark.oracle  # a run of mypy
def test_type_checkers_see_what_is_public(tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    lines = ["import ckpt", *(f"reveal_type({name})" for name in TYPES)]
    user.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(user)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    revealed = re.findall(r'note: Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(TYPES), done.stdout
    for (name, expected), found in zip(TYPES.items(), revealed, strict=True):
        assert expected in found and found != "Any", (name, found)


def test_dir_names_what_is_public_without_loading_it() -> None:
    code = (
        "import sys, ckpt\n"
        "assert set(ckpt.__all__) <= set(dir(ckpt))\n"
        "assert {'convert', 'live', 'reshard', 'trainers', 'universal'} <= set(dir(ckpt))\n"
        "assert not {'torch', 'numpy', 'ckpt.saving'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.oracle  # it imports the trainers
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ckpt.runs.run", "Run"),
        ("ckpt.zero_to_fp32", "load_state_dict_from_zero_checkpoint"),
        ("ckpt.live", "save_fp32"),
        ("ckpt.trainers.hf", "CommittedCheckpoints"),
        ("ckpt.trainers.accelerate", "save_state"),
        ("ckpt.trainers.accelerate", "load_state"),
        ("ckpt.trainers.hf", "CheckpointCallback"),
        ("ckpt.trainers.hf", "ResumeCallback"),
        ("ckpt.trainers.lightning", "DeepSpeedStrategy"),
        ("converters.errors", "CheckpointError"),
        ("converters.zero", "read"),
    ],
)
def test_modules_are_imported_by_the_names_that_the_docs_give(module: str, name: str) -> None:
    assert callable(getattr(import_module(module), name))


def test_older_names_do_the_same_and_warn(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"ckpt\.reshard\.plan"):
        planned = ckpt.reshard.prepare(SOURCE, 1, output=tmp_path / "w1")
    with pytest.warns(DeprecationWarning, match=r"ckpt\.reshard\.execute"):
        facts = ckpt.reshard.run(planned)
    assert facts["schema"] == 1 and facts["output"] == str(tmp_path / "w1")
    by_text = ckpt.reshard.plan(str(SOURCE), 1, output=str(tmp_path / "w1"))
    assert (by_text.output, by_text.tag) == (planned.output, planned.tag)

    with pytest.warns(DeprecationWarning, match=r"ckpt\.universal\.plan_to"):
        planned = ckpt.universal.prepare_to(SOURCE, output=tmp_path / "u")
    with pytest.warns(DeprecationWarning, match=r"ckpt\.universal\.execute"):
        ckpt.universal.run(planned)
    with pytest.warns(DeprecationWarning, match=r"ckpt\.universal\.plan_from"):
        ckpt.universal.prepare_from(tmp_path / "u", 1)

    assert ckpt.convert.prepare is ckpt.convert.plan


def test_the_record_of_a_conversion_is_a_value_and_the_facts_of_its_json(tmp_path: Path) -> None:
    output = tmp_path / "model"
    record = ckpt.convert.execute(ckpt.convert.plan(SOURCE, output))
    content = json.loads((output / "conversion.json").read_text())

    assert record == content and dict(record) == record.as_json() == content
    assert record["checks"]["verified"] is record.checks.verified is True
    assert record["source"]["files"][0]["name"] == record.source.files[0].name
    assert record.get("total_size") == record.total_size and "nothing" not in record
    assert len(repr(record)) < 100

    facts = ckpt.convert.run(ckpt.convert.plan(SOURCE, tmp_path / "again"))
    assert type(facts) is dict and json.loads(json.dumps(facts)) == content


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "Retention(best='loss')": "best is 'loss', expected a metric",
        "Retention(best=('loss', 'min'))": "expected a metric, min or max, and how many",
        "Preemption(deadline='soon')": "deadline is 'soon', expected seconds",
        "Preemption(signals='SIGTERM')": r"expected \(\"SIGTERM\",\)",
        "open('out', 'tf')": 'framework is \'tf\', expected "pt" or "np"',
    }.items(),
)
def test_an_argument_of_another_type_is_named(call: str, message: str) -> None:
    with pytest.raises((ValueError, ckpt.CheckpointError), match=message):
        eval(f"ckpt.{call}")


def test_dir_lists_what_is_public() -> None:
    names = {name for name in dir(ckpt) if not name.startswith("__")}
    modules = {"convert", "dcp", "live", "reshard", "trainers", "universal", "zero_to_fp32"}
    assert names == {name for name in ckpt.__all__ if not name.startswith("__")} | modules
