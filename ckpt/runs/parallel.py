"""Checkpoints of DeepSpeed with pipeline, tensor or expert parallelism, whose states are not read.

What can be shown of them: DeepSpeed named the tag in ``latest``, which it does last (0.19.8
``runtime/engine.py``: ``save_checkpoint``), every file is whole by its form, and no rank is missing
between others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from ckpt.runs import intact
from converters import folder as folders
from converters.errors import CheckpointError

_PARTITION = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def require_parallel(folder: Path, tag: str | None = None) -> str:
    """The tag; ``CheckpointError`` unless all that can be shown of the checkpoint is shown."""
    place = folders.find(folder, tag)
    paths = sorted(path for path in place.folder.iterdir() if path.suffix == ".pt")
    for path in paths:
        intact.require_torch_file(path)
    partitions: dict[int, set[int]] = defaultdict(set)
    models: set[int] = set()
    for path in paths:
        if found := _PARTITION.fullmatch(path.name):
            partitions[int(found[2])].add(int(found[1]))
        if found := _MODEL.fullmatch(path.name):
            models.add(int(found[1]))
    _require_numbered(place.folder, "mp_rank", models | set(partitions))
    widest = set().union(*partitions.values()) if partitions else set[int]()
    for number in sorted(models | set(partitions)) if partitions else ():
        what = f"mp_rank {number}: zero_pp_rank"
        _require_numbered(place.folder, what, widest, partitions.get(number, set()))
    return place.tag


def _require_numbered(
    folder: Path, what: str, numbers: set[int], there: set[int] | None = None
) -> None:
    """``CheckpointError`` if a number up to the highest of ``numbers`` is not ``there``."""
    missing = sorted(
        set(range(max(numbers, default=-1) + 1)) - (numbers if there is None else there)
    )
    if missing:
        raise CheckpointError(f"{folder} has no file of {what} {missing[0]}", "incomplete")
