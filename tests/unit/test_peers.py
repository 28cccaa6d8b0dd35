"""The harness that runs other projects' tests on ckpt: what it says, without their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from oracles import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="test_simple.TestCase" name="test_good" />
<testcase classname="test_simple.TestCase" name="test_serialization">
<failure message="AssertionError: bytes
differ">...</failure></testcase>
<testcase classname="test_simple.TestCase" name="test_bad"><error message="boom" /></testcase>
<testcase classname="test_simple.TestCase" name="test_none"><skipped message="" /></testcase>
</testsuite></testsuites>"""


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
    (tmp_path / "report.xml").write_text(REPORT)
    ours = harness.outcomes(tmp_path / "report.xml")
    assert list(ours.values()) == [
        "passed",
        "failed: AssertionError: bytes differ",
        "failed: boom",
        "skipped",
    ]
    stock = dict.fromkeys(ours, "passed") | {"test_simple.TestCase::test_none": "skipped"}
    peer = harness.PEERS["safetensors"]
    assert harness.report(peer, "save", stock, ours)
    said = capsys.readouterr().out
    assert "save by ckpt: 1 of 3 pass" in said and "failed: boom" in said
    assert said.count("by design: ") == 1
    del stock["test_simple.TestCase::test_bad"]
    assert not harness.report(peer, "save", stock, ours)


def test_a_folder_without_the_tests_is_named(harness: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no folder tests: clone deepspeed"):
        harness.tests_of(harness.PEERS["deepspeed"], tmp_path, tmp_path / "scratch")
