"""Ranks as forks: each as a fresh process, but for what earlier ones have imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles import torchrun, torchruns

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


SURROUNDINGS = """
import json, os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
everywhere = [None] * dist.get_world_size()
dist.all_gather_object(everywhere, dict(os.environ))
if not dist.get_rank():
    json.dump(everywhere, open(sys.argv[1], "w"))
dist.barrier()
"""
OF_EACH_LAUNCH = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE"}
# Of how a test starts torchrun: as forks of it, so that its ranks do not import torch once more.
OF_FORKING = {"FORKED_SCRIPT", "PYTHONPATH", "TORCHDYNAMO_DISABLE"}


def test_ranks_of_two_nodes_see_what_torchrun_shows_them(tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(SURROUNDINGS)
    seen = []
    for fresh in (True, False):
        torchruns(str(script), tmp_path / f"{fresh}.json", limit=120, fresh=fresh)
        seen.append(json.loads((tmp_path / f"{fresh}.json").read_text()))
    for theirs, ours in zip(*seen, strict=True):
        differences = {n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n)}
        assert differences <= OF_EACH_LAUNCH | OF_FORKING
