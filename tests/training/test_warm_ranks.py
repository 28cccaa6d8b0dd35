"""Ranks as forks: each as a fresh process, but for what earlier ones have imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles import torchrun

LOOK = """
import gc, os, sys
assert gc.isenabled() and "TORCHDYNAMO_DISABLE" not in os.environ
assert "ending" not in sys.modules and "warm_ranks" not in sys.modules
modules = {"ckpt.saving.saver", MODULE}
"""
FIRST = "from ending import leave\nfrom importlib import import_module\n"
FIRST += "for name in modules: import_module(name)\n"
SECOND = "assert modules <= sys.modules.keys(), modules - sys.modules.keys()\n"


@pytest.mark.parametrize(
    ("module", "end"),
    [("wsgiref.headers", "leave()"), ("sched", "sys.exit(0)"), ("wsgiref.util", "")],
)
def test_ranks_begin_with_what_earlier_ones_have_imported(
    module: str, end: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    look = LOOK.replace("MODULE", repr(module))
    script.write_text(look + FIRST + end)
    torchrun(str(script), ranks=2, limit=120)
    script.write_text(look + SECOND)
    torchrun(str(script), ranks=2, limit=120)
