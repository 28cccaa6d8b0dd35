"""The cap on memory, held on a checkpoint larger than the cap."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import Client
from hub_server import Hub, hub
from oracles import ROOT

WEIGHTS = {2: 37_500_000, 3: 50_000_000}  # by stage, near enough; in fp32 more than any cap
CAPS = {"fp32": 64 << 20, "bf16": 96 << 20, "fp16": 96 << 20}  # bytes, the whole process
PUSH_CAP = 256 << 20  # less than the client and all weights

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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A checkpoint of each stage, made once for all tests here."""
    from big_checkpoint import write
    from llama_shapes import llama, llama_config

    folders = {stage: tmp_path_factory.mktemp("big") / f"stage{stage}" for stage in WEIGHTS}
    for stage, folder in folders.items():
        config = llama_config(WEIGHTS[stage], tied=False)
        write(folder, llama(config), stage, world=2)
        (folder / "config.json").write_text(json.dumps(config))

    return folders


@pytest.mark.parametrize("dtype", CAPS)
@pytest.mark.parametrize("stage", WEIGHTS)
def test_memory_stays_under_the_cap(
    checkpoints: dict[int, Path], stage: int, dtype: str, tmp_path: Path
) -> None:
    args = ["to-fp32", checkpoints[stage], "-o", tmp_path / "m", "--dtype", dtype]
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert sum(p.stat().st_size for p in (tmp_path / "m").iterdir()) > CAPS[dtype] // 2
    assert 0 < int(done.stderr.split()[-1]) < CAPS[dtype]


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_memory_of_a_push_stays_under_the_cap(
    checkpoints: dict[int, Path], way: str, server: Hub, tmp_path: Path
) -> None:
    client = Client(server, tmp_path)
    done = client.python(
        PEAK, "push", checkpoints[3], f"org/model-{way}", "--uncommitted", "--transport", way
    )
    assert 0 < int(done.stderr.split()[-1]) < PUSH_CAP


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(tmp_path_factory.mktemp("hub") / "hub") as running:
        yield running


# A fork of its own loads each model: memory that one has freed would hide what another takes.
EXTRA = """
import os, re, sys, torch
from pathlib import Path
from torch import nn
import ckpt.weights.opening.load_into
from ckpt.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read
from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint as load

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def model_like(tensors):
    model = nn.Module()
    for path, tensor in tensors.items():
        *parents, name = path.split(".")
        module = model
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(name, nn.Parameter(torch.ones(tensor.shape)))
    return model

def measure(folder):
    model = model_like(read(folder, lazy_mode=True))
    size = sum(p.nbytes for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    load(model, folder)
    print(size, memory("VmHWM") - before, flush=True)

for folder in sys.argv[1:]:
    if not os.fork():
        measure(folder)
        os._exit(0)
    os.wait()
"""


def test_loading_into_a_model_takes_a_chunk_and_not_a_second_model(
    checkpoints: dict[int, Path],
) -> None:
    command = [sys.executable, "-c", EXTRA, *map(str, checkpoints.values())]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == len(checkpoints)
    for size, extra in measured:
        assert size > 140e6
        assert extra < 64 << 20
