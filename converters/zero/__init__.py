"""DeepSpeed's state files, of any ZeRO stage or none.

checkpoint        a folder as a ``Checkpoint``: its weights, step, stage, files
reader            the same as a ``Source``, for ``detect``
files/            a path and a tag as state files, and their keys
stage0, stage12, stage3  where the fp32 weights of each stage lie
weights_16bit     the weights that the model computes with
step_counts       whether the files count the steps of one save
partitioning      how ZeRO cuts parameters up
naming/           which tensor has which name;  assemble  all of them as ``Weights``
optimizer_state   by the name of its parameter;  muon  what Muon keeps;  param_groups
rank_vectors      the weights and states of a param group, as all ranks have them
parallel/         tensor parallelism: the shards of several model-parallel ranks, merged
pipeline/         layers on stages;  experts/  on several ranks;  model_ranks/  what both need
merging/          those of more parallelism as if ZeRO alone had saved them
native/           the files for another world size or stage
universal/        the universal format
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.zero.checkpoint import Checkpoint as Checkpoint
    from converters.zero.checkpoint import read as read

__all__ = ["Checkpoint", "read"]


def __getattr__(name: str) -> Any:
    """``read`` and ``Checkpoint``, loaded when they are first used."""
    if name in __all__:
        from converters.zero import checkpoint

        return getattr(checkpoint, name)

    raise AttributeError(f"module 'converters.zero' has no attribute {name!r}")
