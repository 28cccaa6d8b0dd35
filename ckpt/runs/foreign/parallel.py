"""Checkpoints of DeepSpeed with pipeline, tensor or expert parallelism, whose states are not read.

What can be shown of them: DeepSpeed named the tag in ``latest``, which it does last
(0.19.8 ``runtime/engine.py``: ``save_checkpoint``), every file is whole by its form,
and no rank is missing between others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from ckpt.runs.foreign import intact_files
from converters.errors import CheckpointError
from converters.zero.files import discovery as folders

_PARTITION = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def require_parallel(folder: Path, tag: str | None = None) -> str:
    """The tag; ``CheckpointError`` unless all that can be shown of the checkpoint is shown."""
    place = folders.find(folder, tag)
    state_paths = sorted(
        state_path for state_path in place.folder.iterdir() if state_path.suffix == ".pt"
    )
    for state_path in state_paths:
        intact_files.require_torch_file(state_path)
    partitions_by_model_rank: dict[int, set[int]] = defaultdict(set)
    model_ranks: set[int] = set()
    for state_path in state_paths:
        if match := _PARTITION.fullmatch(state_path.name):
            partitions_by_model_rank[int(match[2])].add(int(match[1]))
        if match := _MODEL.fullmatch(state_path.name):
            model_ranks.add(int(match[1]))

    all_model_ranks = model_ranks | set(partitions_by_model_rank)
    _require_numbered(place.folder, "mp_rank", all_model_ranks)
    if not partitions_by_model_rank:
        return place.tag

    # every model rank has the partitions that any of them has
    all_partitions: set[int] = set().union(*partitions_by_model_rank.values())
    for model_rank in sorted(all_model_ranks):
        _require_numbered(
            place.folder,
            f"mp_rank {model_rank}: zero_pp_rank",
            all_partitions,
            partitions_by_model_rank.get(model_rank, set()),
        )

    return place.tag


def _require_numbered(
    folder: Path,
    description: str,
    numbers: set[int],
    present_numbers: set[int] | None = None,
) -> None:
    """``CheckpointError`` if a number up to the highest of ``numbers`` is not present."""
    missing_numbers = sorted(
        set(range(max(numbers, default=-1) + 1))
        - (numbers if present_numbers is None else present_numbers)
    )
    if missing_numbers:
        raise CheckpointError(
            f"{folder} has no file of {description} {missing_numbers[0]}", "incomplete"
        )
