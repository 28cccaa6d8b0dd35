"""A front end as the guide has it (CONTRIBUTING.md): its blocks save, and go on as the same run."""

from __future__ import annotations

import re
from pathlib import Path

from oracles import ROOT, torchrun

from ckpt.runs.run import Run


def test_the_front_end_of_the_guide_saves_and_goes_on(tmp_path: Path) -> None:
    """With DeepSpeed and without: the same losses, the same run, and the objects of the user."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python front-end\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) == 3
    guide = tmp_path / "guide.py"
    guide.write_text("\n\n".join(blocks))

    log = torchrun("tests/workers/front_end_worker.py", guide, tmp_path, limit=300)
    for name in ("deepspeed", "plain"):
        run, next_run = Run(tmp_path / name), Run(tmp_path / f"{name}-on")
        assert f"resumed from {tmp_path / name / 'checkpoint-2'}" in log
        checkpoints = [*run.checkpoints(), *next_run.checkpoints()]
        assert [checkpoint.name for checkpoint in checkpoints] == ["checkpoint-2", "checkpoint-4"]
        manifests = [checkpoint.manifest for checkpoint in checkpoints]
        assert len({manifest.run for manifest in manifests if manifest}) == 1
        assert (next_run.target("latest") or "").startswith("checkpoint-4")

    (adopted,) = Run(tmp_path / "foreign").checkpoints()
    assert adopted.committed
