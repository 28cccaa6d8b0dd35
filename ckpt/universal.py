"""To DeepSpeed's universal format and back: what is written and where. ``rewriting`` does it.

out/checkpoint-500_universal/      for any world size and stage, with "load_universal": true
  latest_universal                   the tag
  global_step500_universal/          zero/NAME/*.pt, and both kinds of model file
  everything else                    copied
out/checkpoint-500-z2-w3/          native files again
  latest, global_step500/...
"""

from __future__ import annotations

import os
from pathlib import Path

from ckpt import reshard, rewriting, universal_limits
from ckpt.rewriting import Rewriting
from ckpt.rewriting import describe as describe
from ckpt.rewriting import run as run
from converters import groups, trees, universal, zero
from converters import reshard as native
from converters.universal import SUFFIX, planning


def prepare_to(
    checkpoint: Path, *, output: Path | None = None, tag: str | None = None
) -> Rewriting:
    """Plans the universal folder of a checkpoint of ZeRO 1, 2 or 3.

    Reads pickles, no tensors. Raises ``CheckpointError`` for what is damaged, or has no partitions.
    """
    source = zero.read(checkpoint, tag)
    plan = planning.to_universal(source)
    found = groups.read(source, trees.read(source.ranks[0].path).root)
    home = rewriting.home_of(source)
    return Rewriting(
        source,
        None,
        plan,
        Path(os.path.abspath(output or home.with_name(home.name + SUFFIX))),
        planning.universal_tag(source),
        tuple(rewriting.companions_for(home, source.world_size, source.world_size)),
        (*source.notes, *universal_limits.notes(source, found)),
    )


def prepare_from(
    folder: Path,
    world_size: int,
    *,
    stage: int | None = None,
    output: Path | None = None,
    tag: str | None = None,
    like: Path | None = None,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
) -> Rewriting:
    """Plans native files of a universal folder for ``world_size`` ranks and a stage.

    The stage defaults to that of the run that saved. ``like`` is a native checkpoint of the same
    model, for a folder that does not tell the order of the parameters. Reads pickles, and the first
    65,536 elements of each parameter. ``zero_init`` as ``reshard.prepare`` has it. Raises
    ``CheckpointError``.
    """
    source = universal.read(folder, tag, zero.read(like) if like else None)
    checkpoint = source.checkpoint
    home = rewriting.home_of(checkpoint)
    saved = rewriting.stage_of(source)
    target = native.target(checkpoint, stage or saved, world_size, sub_group_size, zero_init)
    plan = planning.from_universal(source, target)
    stage_part = f"-z{target.stage}" if target.stage != saved else ""
    name = f"{home.name.removesuffix(SUFFIX)}{stage_part}-w{world_size}"
    return Rewriting(
        source,
        target,
        plan,
        Path(os.path.abspath(output or home.with_name(name))),
        planning.native_tag(source),
        tuple(rewriting.companions_for(home, checkpoint.world_size, world_size)),
        (*checkpoint.notes, *reshard.notes_on(checkpoint, target)),
    )
