"""Proof of a checkpoint of experts: by place, as ``proof`` proves.

The whole model is compared, and with AutoTP the shards of each tensor-parallel rank as
well: what several of them have is one tensor of the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from converters.errors import CheckpointError
from converters.plan import Plan
from converters.words import numbers
from converters.zero.experts import auto_ep
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import expert_parts, experts, roots
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import expert_files, model_files, proof, reshard
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
    folder = output / reshard.tag_folder(checkpoint)
    parts = expert_files.parts_of(checkpoint, topology, tensor_ranks)
    try:
        result = expert_parts.read(folder)
        results = expert_parts.parts_in(folder) if parts else [result]
        lanes = [experts.dense_lanes(folder)] if not parts else [[part.dense] for part in results]
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({output} is what was written; {proof.BUG})") from error

    merged_from = merged.original(result)
    if tensor_ranks is not None and isinstance(merged_from, TensorParallelCheckpoint):
        proof.verify_cuts(merged_from, tensor_ranks.layouts)
    if len(results) != max(len(parts), 1):
        raise CheckpointError(f"{output} reads as {len(results)} model-parallel ranks; {proof.BUG}")

    own_topology = expert_files.of_part(topology) if parts else topology
    own_ranks = None if parts else tensor_ranks
    counts: Counter[str] = Counter()
    for source, part, part_lanes in zip(parts or [checkpoint], results, lanes, strict=True):
        ranks = ExpertRanks.of(source, own_topology, own_ranks)
        _require_topology(part, part_lanes, ranks, own_topology)
        counts.update(_prove(source, ranks, part, part_lanes, native_plan, output))
    # shards count once
    return {key: count // (topology.tensor_ranks if parts else 1) for key, count in counts.items()}


def _require_topology(
    result: ExpertsCheckpoint,
    lanes: Sequence[MergedCheckpoint],
    ranks: ExpertRanks,
    topology: TargetTopology,
) -> None:
    """Raises unless a result reads as what it was made for."""
    topology_read = (result.stage, result.world_size, result.expert_sizes, len(lanes))
    expected = (topology.stage, topology.world_size, (ranks.count,), len(ranks.lanes))
    if topology_read != expected:
        raise CheckpointError(
            f"{result.place.folder} reads as stage {result.stage} of {result.world_size} ranks in "
            f"each of {len(lanes)} lanes, whose experts are dealt out to "
            f"{numbers(result.expert_sizes)}; {proof.BUG}"
        )


def _prove(
    source: ExpertsCheckpoint,
    ranks: ExpertRanks,
    result: ExpertsCheckpoint,
    lanes: Sequence[MergedCheckpoint],
    native_plan: Plan,
    output: Path,
) -> dict[str, int]:
    """Compares the files of a checkpoint of experts, and of its lanes, with the source."""
    groups = [ranks.with_group_name(group) for group in source.groups]
    counts = proof.verify_tensors(source, groups, result, native_plan, output)
    if len(lanes) > 1:
        for dense, lane in zip(ranks.lanes, lanes, strict=True):
            proof.verify_tensors(dense, dense.groups, lane, native_plan, output)

    provenance = proof.Provenance(native_plan, output)
    for dense, lane in zip(ranks.lanes, lanes, strict=True):
        apart = {roots.FOLDING}
        reshard.verify_optimizer_files(provenance, dense, lane.ranks, reshard.LAYOUT, apart)
        reshard.verify_model_files(provenance, dense, lane.model_paths, _DECIDED)
    return counts
