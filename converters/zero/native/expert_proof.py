"""Proof of a checkpoint of experts: by place, as ``proof`` proves.

The whole model is compared, and with AutoTP the shards of each tensor-parallel rank as
well: what several of them have is one tensor of the whole model.
"""

from __future__ import annotations

from pathlib import Path

from converters.errors import CheckpointError
from converters.plan import Plan
from converters.words import numbers
from converters.zero.experts import auto_ep
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import experts, roots
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import model_files, proof, reshard
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.target import TargetTopology
from converters.zero.parallel.merged_source import TensorParallelCheckpoint

# what the number of experts on a rank decides in a model file
_DECIDED = {*model_files.DECIDED, auto_ep.KEY, roots.INFO, roots.FOLDING, "buffer_names"}


def prove(
    checkpoint: ExpertsCheckpoint,
    topology: TargetTopology,
    native_plan: Plan,
    output: Path,
    tensor_ranks: TensorRanks | None = None,
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    ranks = ExpertRanks.of(checkpoint, topology, tensor_ranks)
    folder = output / reshard.tag_folder(checkpoint)
    try:
        result = experts.read(folder)
        lanes = experts.dense_lanes(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({output} is what was written; {proof.BUG})") from error
    topology_read = (result.stage, result.world_size, result.expert_sizes, len(lanes))
    expected = (topology.stage, topology.world_size, (ranks.count,), len(ranks.lanes))
    if topology_read != expected:
        raise CheckpointError(
            f"{output} reads as stage {result.stage} of {result.world_size} ranks in each of "
            f"{len(lanes)} lanes, whose experts are dealt out to {numbers(result.expert_sizes)}; "
            f"{proof.BUG}"
        )

    groups = [ranks.with_group_name(group) for group in checkpoint.groups]
    counts = proof.verify_tensors(checkpoint, groups, result, native_plan, output)
    source = merged.original(result)
    if tensor_ranks is not None and isinstance(source, TensorParallelCheckpoint):
        proof.verify_cuts(source, tensor_ranks.layouts)
        for dense, lane in zip(ranks.lanes, lanes, strict=True):
            proof.verify_tensors(dense, dense.groups, lane, native_plan, output)

    provenance = proof.Provenance(native_plan, output)
    for dense, lane in zip(ranks.lanes, lanes, strict=True):
        apart = {roots.FOLDING}
        reshard.verify_optimizer_files(provenance, dense, lane.ranks, reshard.LAYOUT, apart)
        reshard.verify_model_files(provenance, dense, lane.model_paths, _DECIDED)
    return counts
