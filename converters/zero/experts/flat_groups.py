"""Experts on several ranks, under stages 1 and 2, or without ZeRO.

    param_shapes (of rank 0)    dense parameters | local experts 0, 1
    ranks of ep rank 0          experts 0, 1     local 0 is expert 0
    ranks of ep rank 1          experts 2, 3     local 0 is expert 2

The param groups of experts are flat vectors like those of other parameters, but each is
shared by the ranks of one expert rank alone (``expert_groups``), and has the names of
its local experts. ``module`` has everything but the experts, cloned; the experts have
files (``expert_files``). Sources: DeepSpeed 0.19.8 ``runtime/engine.py``
(``_save_moe_checkpoint``), ``moe/experts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters import words
from converters.accessors import is_a
from converters.detect.deepspeed import EXPERTS, LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source, SourceTopology
from converters.storage import misplaced_files
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state
from converters.zero.experts import (
    auto_ep,
    expert_files,
    expert_groups,
    whole_model,
    whole_optimizers,
)
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import NATIVE, ExpertFiles
from converters.zero.files import all_ranks, state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.model_ranks.joined_source import Joined
from converters.zero.naming import storage_views

# of the experts of an expert rank, under the names that these have there
LocalWeights = dict[tuple[str, int], TensorRef]


def read(place: Place, files: FolderFiles) -> Source:
    """The weights of the model with all its experts, and the optimizer's state by name.

    ``CheckpointError`` for what is damaged, incomplete, or split up further.
    """
    model = model_file(place, files)
    experts = expert_files.read(place, files, model)
    if not files.optimizers and files.expert_optimizers:
        paths = files.expert_optimizers[0]
        return whole_optimizers.source_of(place, model, experts, paths, expert_paths=paths)
    return of_ranks(place, model, optimizer_files(place, files, model), experts)


def of_ranks(place: Place, model: State, ranks: Sequence[State], experts: ExpertFiles) -> Source:
    """The same of the files of one model-parallel rank."""
    layers = auto_ep.layers_of(model)
    copies, prefixes = whole_model.copies_of(model, layers, experts.tensors)
    masters, local_weights = _masters(model, ranks, layers)
    stacks = {name for layer in layers for name in layer.names}
    stacked_weights = {key: ref for key, ref in local_weights.items() if key[0] in stacks}
    single_weights = {key: ref for key, ref in local_weights.items() if key[0] not in stacks}
    masters |= auto_ep.whole_stacks(model, layers, stacked_weights)
    masters |= numbered(model, single_weights, experts.tensors)

    model_with_experts = whole_model.with_experts(model, layers, copies, prefixes)
    shapes = state_files.shapes(model, "param_shapes")
    parameters = storage_views.complete(model_with_experts, masters, shapes)
    stage = zero.stage_of(dict(enumerate(ranks)))
    if zero.excludes_frozen(stage, model):
        parameters.notes.append(zero.EXCLUDED)

    return Joined(
        kind=EXPERTS,
        place=place,
        model=model_with_experts,
        module=model_with_experts.module,
        parameters=parameters,
        states=[model, *experts.states, *ranks],
        topology=SourceTopology(len(ranks), stage),
    ).source(lambda: (part for rank in ranks for part in optimizer_state.of_flat_groups(rank)))


def model_file(place: Place, files: FolderFiles) -> State:
    """The model file; ``CheckpointError`` where tensors are split up as well."""
    model = first_model(place, files)
    one_save.require_one_model_rank(place, files, model)
    return model


def first_model(place: Place, files: FolderFiles) -> State:
    """The model file of the first model-parallel rank; ``CheckpointError`` without any."""
    if not files.models:
        raise CheckpointError(
            f"{place.folder} has no model file (expected mp_rank_00_model_states.pt); copy it "
            f"from where the checkpoint was saved{misplaced_files.missing(place.folder)}",
            "incomplete",
        )

    return folder_files.read(files.models[min(files.models)])


def optimizer_files(place: Place, files: FolderFiles, model: State) -> list[State]:
    """The optimizer files in rank order; ``CheckpointError`` unless all are there."""
    if 0 not in files.optimizers:
        raise zero.no_optimizer_files(place)

    paths = files.optimizers[0]
    ranks = [folder_files.read(path) for _, path in sorted(paths.items())]
    state_files.require_kinds([model], ranks)
    counts = ranks[0].optimizer.get("partition_count")
    count = max(
        (
            number
            for number in (counts if isinstance(counts, list) else [counts])
            if is_a(number, int)
        ),
        default=1,
    )
    world_size = model.root.get("dp_world_size")
    count = max(count, world_size if is_a(world_size, int) else 1)
    all_ranks.require_ranks(place, count, paths, "optimizer")

    return ranks


def _masters(
    model: State,
    ranks: Sequence[State],
    layers: Sequence[AutoEPLayer],
) -> tuple[dict[str, TensorRef], LocalWeights]:
    """The fp32 weights of what is no expert by name, and those of the local experts."""
    groups = expert_groups.shared_groups(ranks)
    shapes_by_group = state_files.shapes(model, "param_shapes")
    if shapes_by_group is None:
        raise CheckpointError(
            f"{model.path} records no param_shapes, without which the weights of experts have no "
            f"names; {LOAD_THERE}",
            "unsupported",
        )
    if len(shapes_by_group) != len(groups):
        raise model.fail(
            f"param_shapes has {len(shapes_by_group)} groups, the optimizer {len(groups)}; the "
            "files are of two saves"
        )

    is_block = expert_groups.is_block(model)
    masters: dict[str, TensorRef] = {}
    local_weights: LocalWeights = {}
    for group, group_shapes in zip(groups, shapes_by_group, strict=True):
        for expert_rank in range(group.expert_ranks):
            members = expert_groups.ranks_of(group, expert_rank, is_block)
            shapes = auto_ep.local_shapes(model, layers, group_shapes, expert_rank, group)
            weights = expert_groups.flat_group(ranks, group, members, shapes).masters()
            if group.name.has_experts:
                local_weights |= {(name, expert_rank): ref for name, ref in weights.items()}
            else:
                masters |= weights

    return masters, local_weights


def numbered(
    model: State, local_weights: LocalWeights, copies: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """The fp32 weights of experts under their numbers over all ranks.

    ``copies`` are the 16-bit ones. ``CheckpointError`` unless both have the same
    experts.
    """
    counts: dict[str, int] = {}
    for match in map(NATIVE.fullmatch, copies):
        if match is not None:
            counts[match["prefix"]] = max(counts.get(match["prefix"], 0), int(match["expert"]) + 1)

    rank_counts: dict[str, int] = {}
    for name, expert_rank in local_weights:
        rank_counts[name] = max(rank_counts.get(name, 0), expert_rank + 1)

    masters: dict[str, TensorRef] = {}
    for (name, expert_rank), master in local_weights.items():
        match = NATIVE.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{model.path}: {name} is in a param group of experts, and neither DeepSpeed-MoE "
                f"nor AutoEP names experts so; {LOAD_THERE}",
                "unsupported",
            )

        count = counts.get(match["prefix"], 0)
        local_count, remainder = divmod(count, rank_counts[name])
        if remainder or int(match["expert"]) >= local_count:
            raise model.fail(
                f"param_shapes has {name} on each of {rank_counts[name]} expert ranks, but "
                f"there are files of {count} experts; they are of two saves"
            )

        expert = expert_rank * local_count + int(match["expert"])
        global_name = f"{match['prefix']}{expert}{match['inner']}"
        copy = copies.get(global_name)
        if copy is None or copy.shape != master.shape:
            raise model.fail(
                f"{global_name} is trained, but its expert's file has "
                f"{words.shape(copy.shape) if copy is not None else 'none'}, expected "
                f"{words.shape(master.shape)}; the files are of two saves"
            )
        masters[global_name] = master

    return masters
