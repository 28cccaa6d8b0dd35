"""A model-parallel rank of a training of experts without ZeRO, as a checkpoint of its own.

Its weights are in its model file and in those of experts, the optimizer's state in the
files of expert ranks (``unpartitioned``), each of which has the states of everything
that is no expert as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converters.accessors import is_a
from converters.detect.deepspeed import EXPERTS
from converters.names.rules import Names
from converters.source import Place, Source, SourceTopology
from converters.zero.experts import auto_ep, unpartitioned, whole_model
from converters.zero.experts.expert_files import ExpertFiles
from converters.zero.experts.lanes import Lane
from converters.zero.experts.unpartitioned import NamedOptimizers
from converters.zero.files.state_files import State
from converters.zero.model_ranks import numbered_states
from converters.zero.model_ranks.joined_source import Joined
from converters.zero.naming import storage_views


def source_of(
    place: Place,
    model: State,
    experts: ExpertFiles,
    paths: Mapping[int, Path],
    *,
    expert_paths: Mapping[int, Path] | None,
) -> Source:
    """The weights, and the states by order.

    ``paths`` are the optimizer files of this model-parallel rank, ``expert_paths`` those
    of the expert ranks that have the experts; ``None`` where the rank stands for none.
    """
    layers = auto_ep.layers_of(model)
    optimizers = unpartitioned.of_paths(paths)
    copies, prefixes = whole_model.copies_of(model, layers, experts.tensors)
    model_with_experts = whole_model.with_experts(model, layers, copies, prefixes)
    shared_names = storage_views.shared_names(model_with_experts, Names())
    weights = {
        name: ref
        for name, ref in storage_views.complete(model_with_experts, {}, None).frozen.items()
        if name not in shared_names
    }

    dense = {name: ref for name, ref in weights.items() if name not in copies}
    dense = auto_ep.in_optimizer_order(layers, dense)
    optimizer = unpartitioned.of_dense(place.folder, optimizers, dense)
    files = [each.file for each in optimizers]
    if expert_paths is not None:
        expert_optimizers = unpartitioned.optimizers(place, expert_paths)
        by_expert = {name: ref for name, ref in weights.items() if name in copies}
        of_experts = unpartitioned.of_experts(model, expert_optimizers, by_expert, layers)
        optimizer = unpartitioned.joined(optimizer, of_experts)
        paths_of_files = {state.path for state in files}
        files += [each.file for each in expert_optimizers if each.file.path not in paths_of_files]

    source = _joined(place, model_with_experts, optimizer, [*experts.states, *files], shared_names)
    states = replace(optimizer.states, aliases=source.weights.aliases)
    return replace(source, optimizer=states.of)


def lanes_of(place: Place, members: Sequence[Lane], experts: ExpertFiles) -> list[Source]:
    """Tensor-parallel ranks whose experts are dealt out across them.

    The first one stands for the experts of all. ``CheckpointError`` unless the
    optimizers of all expert ranks are there.
    """
    paths = {
        expert_rank: path
        for lane in members
        for expert_rank, path in lane.expert_optimizers.items()
    }
    return [
        source_of(
            place,
            lane.model,
            experts if number == 0 else ExpertFiles({}, ()),
            lane.expert_optimizers,
            expert_paths=paths if number == 0 else None,
        )
        for number, lane in enumerate(members)
    ]


def _joined(
    place: Place,
    model: State,
    optimizer: NamedOptimizers,
    files: list[State],
    shared_names: Mapping[str, str],
) -> Source:
    """The weights by name, as a ``Source`` without states."""
    parameters = storage_views.complete(model, dict(optimizer.masters), None)
    for name, owner in shared_names.items():
        if owner in parameters.frozen and parameters.frozen.pop(name, None) is not None:
            parameters.aliases[name] = owner
    if optimizer.states.by_name is None:
        parameters.notes.append(f"the optimizer's state is absent: {numbered_states.UNKNOWN}")

    world_size = model.root.get("dp_world_size")
    return Joined(
        kind=EXPERTS,
        place=place,
        model=model,
        module=model.module,
        parameters=parameters,
        states=[model, *files],
        topology=SourceTopology(world_size if is_a(world_size, int) else len(files), 0),
    ).source()
