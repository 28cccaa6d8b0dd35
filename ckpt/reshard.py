"""A checkpoint for another world size or stage: what is written and where. ``rewriting`` does it.

out/checkpoint-500-w3/       three ranks; checkpoint-500-z3-w3 where the stage is another, too
  latest                       the tag
  global_step500/...           DeepSpeed's files
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckpt import rewriting
from ckpt.rewriting import Rewriting
from ckpt.rewriting import describe as describe
from ckpt.rewriting import run as run
from converters import muon, reshard, zero
from converters.errors import CheckpointError
from converters.optimizer_trees import SUB_GROUP, Target


def prepare(
    checkpoint: Path,
    world_size: int,
    *,
    stage: int | None = None,
    output: Path | None = None,
    tag: str | None = None,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
) -> Rewriting:
    """Plans the same checkpoint for ``world_size`` ranks and a stage, its own by default.

    Reads pickles, and what ranks share of Muon's momentum. ``sub_group_size`` (elements, stage 3)
    defaults to the run's own. ``zero_init``: whether the engine's model will be made under
    ``zero.Init``; only for Muon, from stage 1 or 2 to 3. Raises ``CheckpointError`` for what is
    damaged, or cannot be cut up anew.
    """
    source = zero.read(checkpoint, tag)
    target = reshard.target(source, stage, world_size, sub_group_size, zero_init)
    same = (target.stage, target.world_size) == (source.stage, source.world_size)
    if same and (target.stage < 3 or target.sub_group_size == _sub_group_size(source)):
        raise CheckpointError(
            f"{source.place.folder} is of stage {source.stage} for {source.world_size} ranks "
            "already; load it as it is",
            "output",
        )
    plan = reshard.plan(source, target)
    home = rewriting.home_of(source)
    if output is None:
        stage_part = f"-z{target.stage}" if target.stage != source.stage else ""
        output = home.with_name(f"{home.name}{stage_part}-w{world_size}")
    companions = tuple(rewriting.companions_for(home, source.world_size, world_size))
    copied = {path.name for path, _ in companions}
    left = [
        path.name
        for path in sorted(home.iterdir())
        if path.is_file() and path.name not in (*copied, *rewriting.OURS)
    ]
    notes = [*source.notes, *notes_on(source, target)]
    if left:
        notes.append(f"not copied: {', '.join(left)}")
    place, folder = Path(os.path.abspath(output)), reshard.tag_folder(source)
    return Rewriting(source, target, plan, place, folder, companions, tuple(notes))


def _sub_group_size(source: zero.Checkpoint) -> int:
    """What the run of a checkpoint of stage 3 was configured with."""
    found = source.model.setting("zero_optimization", "sub_group_size")
    return int(found) if isinstance(found, (int, float)) else SUB_GROUP


def notes_on(source: zero.Checkpoint, target: Target) -> Iterator[str]:
    """What whoever resumes from ``target`` should know."""
    setting = source.model.setting
    if target.world_size > source.world_size:
        yield (
            f"the ranks from {source.world_size} on are new: each has the random and extra state "
            f"of the rank modulo {source.world_size}"
        )
    if target.world_size < source.world_size:
        yield f"what only ranks {target.world_size} and up had, such as random states, is left out"
    if target.stage == 3 and source.stage < 3:
        yield f"made for sub_group_size {target.sub_group_size}; the engine must have the same"
    if target.stage < 3 and target.dealt:
        yield "made for round_robin_gradients; the engine must have it, too"
    if setting("zero_optimization", "offload_optimizer", "device") == "nvme":
        yield (
            "made for an engine whose optimizer is not on NVMe: that looks for files of its own "
            "(offloaded_tensors), which are not made here"
        )
    if target.stage < 3 and muon.deepspeeds(source.model):
        here = "an optimizer that is not offloaded" if target.muon else "an offloaded optimizer"
        yield (
            f"Muon: made for {'BF16_Optimizer' if target.bf16 else here}; the engine must have the "
            "same, or DeepSpeed takes other elements for the momentum"
        )
    if target.stage < 3 and setting("zero_optimization", "elastic_checkpoint"):
        yield "elastic_checkpoint: DeepSpeed asks for optimizers that count steps in their groups"
