"""fp32 weights back inside the training script: both flows of DeepSpeed's integration guides."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import ROOT, live, same, weights_in

pytestmark = pytest.mark.xdist_group("training")


@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3"])
def test_a_trainers_model_is_ordinary_again_with_the_checkpoints_weights(
    name: str, tmp_path: Path
) -> None:
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
        lock.unlink()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", port, str(ROOT / "tests/recovery_worker.py"), str(tmp_path), name]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    masters = live(tmp_path)["fp32"]
    for number in ("0", "1"):
        found = weights_in(tmp_path / number)
        assert len(found) >= len(masters) - 1
        for key, value in found.items():
            assert value.dtype in (torch.bfloat16, torch.float32)
            assert same(value, masters[key].to(value.dtype)), key
