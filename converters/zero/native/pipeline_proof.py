"""Proof of a pipeline that was written for other stages: read again, it has every element
of the source (``proof``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.plan import Plan
from converters.source import Source
from converters.torch_files import object_graph
from converters.zero.files.state_files import State
from converters.zero.merging import numbered_pipeline, pipeline
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import pipeline_files, proof, reshard
from converters.zero.native.optimizer_files import SCALING
from converters.zero.native.target import TargetTopology
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import reader
from converters.zero.pipeline.stages import PipelineCheckpoint
from converters.zero.pipeline.unpartitioned import UnpartitionedPipeline


def prove(
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    native_plan: Plan,
    output: Path,
    tensor_ranks: TensorRanks | None = None,
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    result = reader.read(output / reshard.tag_folder(checkpoint), complete=True)
    if tensor_ranks is not None and isinstance(result, TensorParallelCheckpoint):
        # the shards are those of these cuts, and the files say the same cuts
        proof.verify_cuts(result, tensor_ranks.layouts)

    lanes = result.lanes if isinstance(result, TensorParallelCheckpoint) else (result,)
    if len(lanes) != topology.tensor_ranks:
        raise CheckpointError(f"{output} reads as {len(lanes)} tensor-parallel ranks; {proof.BUG}")

    provenance = proof.Provenance(native_plan, output)
    counts: Counter[str] = Counter(parameters=0, states=0, others=0, copies=0)
    for rank, shards in enumerate(reshard.by_tensor_rank(checkpoint, tensor_ranks)):
        lane = _Lane.of(lanes[rank], checkpoint)
        counts.update(_prove_stages(provenance, shards, topology, lane))
        trees = pipeline_files.layer_trees(checkpoint, shards, topology, rank)
        counts["copies"] += _prove_layers(provenance, trees, lane)
    return {key: count // len(lanes) for key, count in counts.items()}


@dataclass(frozen=True, slots=True)
class _Lane:
    """What the files of a tensor-parallel rank hold: the param groups, the model file and
    the optimizer files of each stage, and the layer files."""

    source: Source
    groups: Sequence[Sequence[ParamGroup]]
    models: Sequence[State]
    optimizers: Sequence[Sequence[State]]
    layers: Mapping[int, State]

    @staticmethod
    def of(result: Source, checkpoint: MergedCheckpoint) -> _Lane:
        """What was read of the files that were made of a checkpoint."""
        if isinstance(result, UnpartitionedPipeline):
            keys = [home.key for home in pipeline_files.source_of(checkpoint).homes]
            groups = numbered_pipeline.groups_by_stage(result, *keys)
            optimizers = [()] * len(groups)
            return _Lane(result, groups, result.models, optimizers, result.layers)

        if not isinstance(result, PipelineCheckpoint):
            raise CheckpointError(f"{result.place.folder} reads as no pipeline; {proof.BUG}")
        return _Lane(
            result,
            [pipeline.groups_of_stage(result, number) for number in range(len(result.stages))],
            [stage.model for stage in result.stages],
            [stage.ranks for stage in result.stages],
            result.layers,
        )


def _prove_stages(
    provenance: proof.Provenance,
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    lane: _Lane,
) -> Counter[str]:
    """Compares the stages of a tensor-parallel rank; counts their parameters and states."""
    if len(lane.models) != len(topology.stages):
        raise CheckpointError(
            f"{lane.source.place.folder} reads as {len(lane.models)} stages; {proof.BUG}"
        )

    counts: Counter[str] = Counter()
    for number, stage in enumerate(topology.stages):
        own_groups = pipeline_files.groups_of(checkpoint, stage)
        counts.update(proof.verify_groups(provenance, lane.source, own_groups, lane.groups[number]))
        _prove_metadata(provenance, checkpoint, topology, lane, number)
    return counts


def _prove_metadata(
    provenance: proof.Provenance,
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    lane: _Lane,
    number: int,
) -> None:
    """Compares what the files of a stage have beside tensors."""
    decided_keys = reshard.LAYOUT | (set(SCALING) if topology.bf16 else set())
    optimizers = lane.optimizers[number]
    if optimizers:
        reshard.verify_optimizer_files(provenance, checkpoint, optimizers, decided_keys)

    path = lane.models[number].path
    root = object_graph.read_root(checkpoint.model.path)
    source_root = {**root, "optimizer": None, **pipeline_files.cuts_of(checkpoint, root)}
    result_root = object_graph.read_root(path)
    decided_keys = pipeline_files.DECIDED if optimizers else {*pipeline_files.DECIDED, "optimizer"}
    proof.verify_metadata(provenance, source_root, result_root, decided_keys, path)


def _prove_layers(
    provenance: proof.Provenance,
    trees: Iterable[tuple[str, Any]],
    lane: _Lane,
) -> int:
    """Compares the layer files; counts their tensors."""
    paths = {state.path.name: state.path for state in lane.layers.values()}
    count = 0
    for name, tree in trees:
        if name not in paths:
            raise CheckpointError(f"{lane.source.place.folder} has no {name}; {proof.BUG}")
        entries: Mapping[Any, Any] = dict(object_graph.pairs(tree))
        own_entries = dict(object_graph.pairs(object_graph.read(paths[name]).root))
        proof.verify_metadata(provenance, entries, own_entries, set(), paths[name])
        count += len(entries)
    return count
