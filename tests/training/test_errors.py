"""A failure is said once: on the rank where it happened and on rank 0, in one short traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from oracles import torchrun

from ckpt.distributed.ranks import RankGroup
from converters.errors import CheckpointError

RANKS = 4
LIMIT = 900  # seconds; it takes 30, and minutes more where an extension is compiled


def test_the_sentence_of_a_failure_is_printed_at_most_twice(tmp_path: Path) -> None:
    worker = "tests/workers/errors_worker.py"
    said = torchrun(worker, tmp_path, ranks=RANKS, limit=LIMIT, code=1, NOTICE="60")
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(RANKS)]
    for case in told[0]:
        texts = [told[rank][case][0] for rank in range(RANKS)]
        prints = [told[rank][case][1] for rank in range(RANKS)]
        if case == "absent":  # rank 1 was elsewhere
            texts[1] = prints[1] = ""
        sentence = texts[0].partition(" failed on ")[2]
        assert sentence.startswith("rank "), (case, texts)
        words = sentence.partition(": ")[2]
        assert 1 <= sum(text.count(words) for text in prints) <= 2, (case, prints)
        for rank, text in enumerate(prints):
            assert text.count("Traceback") == bool(text), (case, rank, text)
            assert len(text.splitlines()) < 32 and ".Told" not in text, text
            assert "During handling" not in text and "direct cause" not in text
        for text in texts[2:]:
            if words not in text:
                assert text.partition(" ... ")[0] in texts[0] and "(in full on ranks 0 and" in text
                assert len(text) < 150 and "\n" not in text
    whole = {case: [told[0][case][0] in t[case][0] for t in told] for case in told[0]}
    assert whole["extra"] == whole["files"] == whole["resume"] == [True, True, False, False]
    assert whole["gone"] == [True, True, False, False]  # rank 0 failed
    assert "latest is a folder, where a file is to be that names" in told[0]["folder"][0]
    where = told[1]["extra"][1].splitlines()[-1]  # Python 3.11 shows notes
    assert "errors_worker.py" in where and where.endswith("in state_dict")
    lines = [line for line in said.splitlines() if line.startswith("ckpt: save failed on rank 1")]
    assert len(lines) == RANKS
    assert sum(line.endswith("No space left on device") for line in lines) == 2


def test_what_is_not_ours_is_one_error_with_the_place(alone: Any) -> None:
    with pytest.raises(CheckpointError) as failure, RankGroup("save", 5).step():
        raise RuntimeError("memory on fire")
    assert str(failure.value) == "save failed on rank 0: RuntimeError: memory on fire"
    assert failure.value.__cause__ is None and failure.value.__suppress_context__
    with pytest.raises(CheckpointError) as failure, RankGroup("save", 5).step():
        raise dist.DistNetworkError("connection reset\nException raised from x\nframe #0: y")
    assert "connection reset" in str(failure.value) and "frame" not in str(failure.value)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
