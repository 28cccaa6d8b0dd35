"""A run trained here and now, by real processes, then converted as a newcomer would do it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import FIXTURES, ROOT, convert, live, root_of, same

# One worker of the test run at a time: DeepSpeed compiles an extension at its first start.
pytestmark = pytest.mark.xdist_group("training")


@pytest.mark.parametrize("name", ["zero2-bf16-w2", "trainer-zero3"])
def test_a_freshly_trained_checkpoint_is_converted(name: str, tmp_path: Path) -> None:
    extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in extensions.rglob("lock"):
        lock.unlink()  # of a build that was killed: every later run would wait for it
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", port, str(ROOT / "scripts/fixture_worker.py"), str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = convert(root_of(tmp_path / name), tmp_path / "model")
    masters = live(tmp_path / name)["fp32"]
    assert masters.keys() == live(FIXTURES / name)["fp32"].keys()
    owned = [key for key in masters if key in weights]
    assert len(owned) >= len(masters) - 1
    assert all(same(weights[key], masters[key]) for key in owned)
    if name.startswith("trainer"):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", output_loading_info=True
        )
        assert not any(info.values()) and model.lm_head.weight.isfinite().all()
