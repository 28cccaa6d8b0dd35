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
from ckpt.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), file=sys.stderr)
"""


@pytest.fixture(scope="module", params=[2, 3], ids=["stage2", "stage3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "checkpoint-1"
    script = [sys.executable, ROOT / "scripts/fixtures/big_checkpoint.py", folder]
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


EXTRA = """
import re, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint as load
def held(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).float()
size = sum(p.nbytes for p in model.parameters())
import ckpt.weights.opening.load_into
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = held("VmRSS")
load(model, sys.argv[1])
print(size, held("VmHWM") - before)
"""


def test_loading_into_a_model_takes_a_chunk_and_not_a_second_model(checkpoint: Path) -> None:
    command = [sys.executable, "-c", EXTRA, str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    size, extra = map(int, done.stdout.split()[-2:])
    assert size > 140e6
    assert extra < 64 << 20
