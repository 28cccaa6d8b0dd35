"""What a tensor-parallel rank has, as a checkpoint of its own: its shards of what is dense.

One of the lanes stands for all in what is no lane's alone, such as experts that are
dealt out across them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from converters.detect.deepspeed import EXPERTS
from converters.source import Place, Source, SourceTopology
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state
from converters.zero.experts import expert_groups
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.experts.lanes import Lane
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.model_ranks.joined_source import Joined
from converters.zero.naming.assemble import Parameters

Weights = dict[str, TensorRef]
Shapes = dict[str, Shape]


def dense_weights(lane: Lane) -> Weights:
    """The fp32 weights of a lane that are no experts."""
    masters: Weights = {}
    members = range(len(lane.ranks))
    for group, shapes in with_shapes(lane.model, expert_groups.matched_groups(lane.ranks)):
        if not group.name.has_experts:
            expert_groups.require_count(lane.ranks[0], group)
            masters |= expert_groups.flat_group(lane.ranks, group, members, shapes).masters()

    return masters


def with_shapes(
    model: State, groups: Sequence[SharedGroup]
) -> list[tuple[SharedGroup, dict[str, Shape]]]:
    """Each group with its part of ``param_shapes``,
    which is in the order of the first file."""
    shapes = state_files.shapes(model, "param_shapes") or []
    if len(shapes) != len(groups):
        raise model.fail(
            f"param_shapes has {len(shapes)} groups, the optimizer {len(groups)}; the "
            "files are of two saves"
        )
    return list(zip(groups, shapes, strict=True))


def expert_weights(
    states: Sequence[State],
    model: State,
    part_of: Callable[[SharedGroup, Shapes, int], tuple[Sequence[int], Shapes]],
) -> dict[tuple[str, int], TensorRef]:
    """The fp32 weights of experts by name and expert rank, from the optimizer files of
    all ranks.

    ``part_of`` says of a group, its part of ``param_shapes`` and an expert rank which
    ranks have them, and the shapes there.
    """
    local_weights: dict[tuple[str, int], TensorRef] = {}
    for group, shapes in with_shapes(model, expert_groups.matched_groups(states)):
        if not group.name.has_experts:
            continue
        expert_groups.require_count(states[0], group)
        for expert_rank in range(group.expert_ranks):
            ranks, local_shapes = part_of(group, shapes, expert_rank)
            flat = expert_groups.flat_group(states, group, ranks, local_shapes)
            local_weights |= {(name, expert_rank): ref for name, ref in flat.masters().items()}

    return local_weights


def of_lane(
    place: Place, lane: Lane, model: State, parameters: Parameters, files: Sequence[State]
) -> Source:
    """The shards of a lane as a checkpoint of its own.

    ``model`` is its model file with what else is in ``parameters``; the tensors lie in
    ``files`` besides.
    """
    stage = zero.stage_of(dict(enumerate(lane.ranks)))
    if zero.excludes_frozen(stage, lane.model):
        parameters.notes.append(zero.EXCLUDED)

    def partitions() -> Iterator[optimizer_state.Partition]:
        for rank, state in enumerate(files):
            if state.root.get("optimizer_state_dict") is None:
                continue
            if stage == 3:
                yield from optimizer_state.of_sub_groups(place.folder, rank, state)
            else:
                yield from optimizer_state.of_flat_groups(state)

    return Joined(
        kind=EXPERTS,
        place=place,
        model=model,
        module=model.module,
        parameters=parameters,
        states=[lane.model, *files],
        topology=SourceTopology(len(lane.ranks), stage),
    ).source(partitions)
