"""The entries of files of AutoEP with AutoTP on the rank that wrote them.

Nothing without AutoTP. An engine compares them with its own ranks. Source: DeepSpeed
0.19.8 ``checkpoint/autoep_universal.py`` (``make_folding_metadata``),
``runtime/engine.py`` (``_autoep_zero_optimizer_param_families``,
``_autoep_non_expert_param_families``, ``_save_moe_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.torch_files import object_graph
from converters.zero.experts import folded_lanes
from converters.zero.merging import whole_groups
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.target import TargetTopology

Tree = dict[Any, Any]
_EXPERT, _ROUTER, _SHARED, _DENSE = (
    "routed_expert",
    "router_gate_replicated",
    "shared_expert",
    "dense",
)


def of_optimizer(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology, rank: int
) -> Tree:
    """The entry of the optimizer file of a rank;
    before stage 3 with the place of each parameter among those that share it."""
    families: Tree = {}
    for group in ranks.groups(checkpoint, rank) if topology.stage < 3 else ():
        seat = ranks.seat(group, rank)
        for name in group.shapes:
            family = _EXPERT if ".experts." in name else _family(name)
            families[name] = {
                "family": family,
                "zero_partition_group": "edp" if family == _EXPERT else "dense_dp",
                "zero_partition_rank": seat.position,
                "zero_partition_count": len(seat.team),
            }

    place = ("per_family", rank // len(ranks.lanes), ranks.data_ranks)
    return _entry(checkpoint, ranks, rank, "zero_optimizer_state", place, families)


def of_model(checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, rank: int, tree: Tree) -> Tree:
    """The entry of the model file of a rank, whose state dict is in ``tree``."""
    families = {name: _family(name) for name, _ in object_graph.pairs(tree["module"])}
    place = ("dense_dp", rank // len(ranks.lanes), ranks.data_ranks)
    return _entry(checkpoint, ranks, rank, _DENSE, place, families)


def of_expert(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, layer: int, expert: int
) -> Iterator[tuple[int, Tree]]:
    """The tensor-parallel ranks that have a file of an expert, and the entry of each."""
    if len(ranks.lanes) == 1:
        yield 0, {}
        return

    single_counts = list(whole_groups.expert_counts(checkpoint.weights.order).values())
    count = checkpoint.layers[layer].count if checkpoint.layers else single_counts[layer]
    owner = expert // (count // ranks.count)
    # DeepSpeed has the first data ranks write, as many as there are expert ranks
    writers = range(min(ranks.world_size, ranks.count * len(ranks.lanes)))
    last_writers = {ranks.lane(rank): rank for rank in writers if ranks.expert_rank(rank) == owner}
    for lane, rank in sorted(last_writers.items()):
        place = ("edp", rank // ranks.count, ranks.shared_by)
        yield lane, _entry(checkpoint, ranks, rank, _EXPERT, place, {})


def _family(name: str) -> str:
    """What a parameter that is no routed expert counts as."""
    if ".router." in name:
        return _ROUTER
    return _SHARED if ".shared_experts" in name else _DENSE


def _entry(
    checkpoint: ExpertsCheckpoint,
    ranks: ExpertRanks,
    rank: int,
    family: str,
    place: tuple[str, int, int],
    families: Tree,
) -> Tree:
    """The entry; ``place`` is the kind of ranks that share the file, which of them it is
    of, and how many they are. Nothing of DeepSpeed-MoE."""
    if len(ranks.lanes) == 1 or not checkpoint.layers:
        return {}

    kind, position, count = place
    entry: Tree = {
        "version": folded_lanes.VERSION,
        "tp_size": len(ranks.lanes),
        "tp_rank": ranks.lane(rank),
        "ep_size": ranks.count,
        "ep_rank": ranks.expert_rank(rank),
        "etp_size": 1,
        "etp_rank": 0,
        "zero_partition_group": kind,
        "zero_partition_rank": position,
        "zero_partition_count": count,
        "dispatch_strategy": "route_full_partition_dispatch",
        "shared_expert_placement": "tp_sharded",
        "family": family,
    }
    if families:
        entry["param_families"] = families
    return {folded_lanes.KEY: entry}
