"""DeepSpeed's native files of a checkpoint of FSDP that an engine is to go on from.

It is what ``ckpt from-dcp`` writes, with what that has to be told by options: the engine
knows its precision, and which of its tensors are buffers.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ckpt.distributed.ranks import RankGroup, alive
from ckpt.rewrite import dcp, reshard_command
from converters.detect import detect, sharded
from converters.detect import detection as detections
from converters.errors import CheckpointError
from converters.storage import open_files, stores
from converters.zero.native.target import TargetTopology


def loadable_path(
    ranks: RankGroup, source: Path, target: TargetTopology, precision: str, buffers: Collection[str]
) -> Path:
    """The path that an engine loads: of a checkpoint of FSDP that of ``native_files``, which
    rank 0 makes; of anything else itself. Every rank calls it; raises as these do."""
    with ranks.step() as outcome:
        if not ranks.rank and is_source(source):
            with alive(ranks):
                outcome.value = native_files(source, target, precision, buffers).name

    name = outcome.heard[0]
    return Path(os.path.abspath(source)).with_name(name) if name else source


def is_source(path: Path) -> bool:
    """Whether a path is a checkpoint of FSDP or DCP itself; not so a run that has one."""
    if not stores.is_folder(path):
        return False
    try:
        return detect(path).kind.name in sharded.READ
    except CheckpointError:
        return False


@open_files.once()
def native_files(
    path: Path, target: TargetTopology, precision: str, buffers: Collection[str]
) -> Path:
    """The folder beside ``path`` with the native files of a checkpoint of FSDP, made anew.

    ``precision`` is the engine's, of which fp16 loads the files of bf16 with a new loss
    scale; ``buffers`` are its names of buffers, in the files or not.
    ``CheckpointError`` as ``dcp.plan_from`` and ``dcp.execute`` raise, and where something
    else lies there already.
    """
    path = Path(os.path.abspath(path))
    source_names = detections.read(path, complete=True).weights.by_every_name()
    crossing = dcp.plan_from(
        path,
        target.world_size,
        stage=target.stage,
        dtype="fp32" if precision == "fp32" else "bf16",
        buffer=[name for name in buffers if name in source_names],
        sub_group_size=target.sub_group_size,
    )
    output = crossing.output
    if output.exists() and not reshard_command.is_made_of(crossing.home, output):
        raise CheckpointError(
            f"{output} exists, and was not made of {path}; move it away, or resume from it by name",
            "output",
        )

    dcp.execute(crossing, overwrite=output.exists())
    return output
