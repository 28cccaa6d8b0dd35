"""The entries of model files on AutoEP: how many experts a rank has, and which.

Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``_save_moe_checkpoint``),
``checkpoint/autoep_affine.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from converters.zero.experts.auto_ep import KEY, AutoEPLayer
from converters.zero.merging import roots
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.target import TargetTopology

Entry = dict[str, Any]
# of universal_checkpoint_info, where nothing is cut for tensor-parallel ranks
_INFO_KEYS = ("universal_checkpoint_version", "expert_parameter_patterns")


def entries(
    checkpoint: ExpertsCheckpoint,
    root: Mapping[Any, Any],
    ranks: ExpertRanks,
    topology: TargetTopology,
    rank: int,
) -> Entry:
    """The entries of the model file of a rank, from the root of one of the source."""
    if not checkpoint.layers:
        return {}

    source_entries = root[KEY]
    layers = [
        _layer(checkpoint, layer, entry, ranks, topology, rank)
        for layer, entry in zip(checkpoint.layers, source_entries, strict=True)
    ]
    changes: Entry = {KEY: layers}
    info = root.get(roots.INFO)
    if isinstance(info, dict):
        own_info = {
            key: value
            for key, value in info.items()
            if key in _INFO_KEYS or topology.tensor_ranks > 1
        }
        changes[roots.INFO] = {**own_info, KEY: layers}
    return changes


def _layer(
    checkpoint: ExpertsCheckpoint,
    layer: AutoEPLayer,
    entry: Mapping[Any, Any],
    ranks: ExpertRanks,
    topology: TargetTopology,
    rank: int,
) -> Entry:
    """What a file says of a layer; what older versions do not say is not added."""
    local_count, expert_rank = layer.count // ranks.count, ranks.expert_rank(rank)
    first = expert_rank * local_count
    is_partitioned = topology.stage == 3
    team = [peer for peer in range(ranks.world_size) if ranks.expert_rank(peer) == expert_rank]
    shapes = {
        name: checkpoint.weights.tensors[name].shape
        for name in layer.names
        if name in checkpoint.weights.tensors
    }
    values = {
        "num_local_experts": local_count,
        "ep_size": ranks.count,
        "expert_placement": _placement(layer, ranks.count),
        "affine_maps": {
            "version": 1,
            "params": {name: _affine_map(shape, ranks.count) for name, shape in shapes.items()},
        },
        "checkpoint_format": "zero3_partitioned" if is_partitioned else "per_expert_files",
        "checkpoint_format_version": 1 if is_partitioned else None,
        "ep_group_name": f"ep_size_{ranks.count}",
        "ep_rank": expert_rank,
        "expert_data_parallel_rank": team.index(rank),
        "expert_data_parallel_world_size": ranks.shared_by,
        "global_expert_start": first,
        "global_expert_end": first + local_count,
    }
    return {**entry, **{key: value for key, value in values.items() if key in entry}}


def _placement(layer: AutoEPLayer, count: int) -> Entry:
    """Which experts each expert rank has: those of a rank follow one another."""
    local_count = layer.count // count
    return {
        "version": 1,
        "num_experts": layer.count,
        "ep_size": count,
        "ranks": [
            {
                "rank": rank,
                "experts": list(range(rank * local_count, (rank + 1) * local_count)),
            }
            for rank in range(count)
        ],
    }


def _affine_map(shape: Sequence[int], count: int) -> Entry:
    """Where the stack of each expert rank lies in that of all, as strided pieces."""
    shard_shape = [shape[0] // count, *shape[1:]]
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return {
        "logical_shape": list(shape),
        "ranks": {
            rank: {
                "shard_shape": shard_shape,
                "pieces": [
                    {
                        "shape": shard_shape,
                        "source": [rank * prod(shard_shape), strides],
                        "dest": [0, strides],
                        "locations": [rank],
                    }
                ],
            }
            for rank in range(count)
        },
    }
