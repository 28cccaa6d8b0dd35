"""The harness that runs other projects' tests on ckpt: what it says, without their tests."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from oracles import ROOT

CASES = [
    {"name": "test_simple.py::TestCase::test_good", "outcome": "passed"},
    {"name": "test_simple.py::TestCase::test_serialization", "outcome": "failed", "message": "x"},
    {"name": "test_simple.py::TestCase::test_bad", "outcome": "failed", "message": "boom"},
    {"name": "test_simple.py::TestCase::test_none", "outcome": "skipped"},
]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_peers", ROOT / "scripts/peers/run_peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_peers", module)
    spec.loader.exec_module(module)
    return module


def test_what_fails_with_ckpt_alone_is_listed(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, CASES)))
    ours = harness.outcomes(tmp_path / "lines")
    assert list(ours.values()) == ["passed", "failed: x", "failed: boom", "skipped"]
    stock = dict.fromkeys(ours, "passed") | {CASES[3]["name"]: "skipped"}
    peer = harness.PEERS["safetensors"]
    assert harness.report(peer, "save", stock, ours)
    said = capsys.readouterr().out
    assert "save by ckpt: 1 of 3 pass" in said and "failed: boom" in said
    assert said.count("by design: ") == 1
    assert "not run" not in said

    del ours[CASES[0]["name"]]  # the time was up before it
    assert harness.report(peer, "save", stock, ours)
    assert "0 of 2 pass, 1 more were not run" in capsys.readouterr().out
    ours[CASES[0]["name"]] = "passed"
    del stock[CASES[2]["name"]]
    assert not harness.report(peer, "save", stock, ours)


def test_a_folder_without_the_tests_is_named(harness: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no folder tests: clone deepspeed"):
        harness.tests_of(harness.PEERS["deepspeed"], tmp_path, tmp_path / "scratch")
