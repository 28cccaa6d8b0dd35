"""The cap on memory, held on a checkpoint larger than the cap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from oracles import ROOT

CAPS = {"fp32": 64 << 20, "bf16": 96 << 20, "fp16": 96 << 20}  # bytes, the whole process

# VmHWM is the process's own; ru_maxrss would count the test runner, which forked it.
PEAK = """
import re, sys
from ckpt.cli import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), file=sys.stderr)
"""


@pytest.fixture(scope="module", params=[2, 3], ids=["stage2", "stage3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "checkpoint-1"
    script = [sys.executable, ROOT / "scripts/big_checkpoint.py", folder]
    script += ["--stage", str(request.param), "--gb", "0.15"]
    subprocess.run(script, check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize("dtype", CAPS)
def test_memory_stays_under_the_cap(checkpoint: Path, dtype: str, tmp_path: Path) -> None:
    args = ["to-fp32", checkpoint, "-o", tmp_path / "m", "--dtype", dtype]
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert sum(p.stat().st_size for p in (tmp_path / "m").iterdir()) > CAPS[dtype] // 2
    assert 0 < int(done.stderr) < CAPS[dtype]
