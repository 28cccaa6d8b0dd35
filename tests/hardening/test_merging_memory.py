"""The cap on memory of a merge: 64 MiB and the largest tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import zero_folders
from heavy_libraries import peft
from oracles import ROOT
from test_memory import PEAK

SIZE, LAYERS = 2048, 7


def test_memory_stays_under_the_cap(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)]
    config = peft.LoraConfig(r=16, lora_alpha=24, target_modules=[str(n) for n in range(LAYERS)])
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-1", exclude_frozen=False)
    values = {"peft_type": "LORA", "lora_alpha": 24}
    (checkpoint / "adapter_config.json").write_text(json.dumps(values))

    args = ["to-fp32", checkpoint, "-o", tmp_path / "m", "--merge"]
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)

    largest = SIZE * SIZE * 4
    assert (tmp_path / "m/model.safetensors").stat().st_size > LAYERS * largest
    assert 0 < int(done.stderr.split()[-1]) < (64 << 20) + largest
