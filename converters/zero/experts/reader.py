"""A checkpoint of DeepSpeed-MoE or AutoEP as a ``Source``: the row "deepspeed-experts"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters import quantized
from converters.accessors import is_whole_number
from converters.detect.deepspeed import EXPERTS, LOAD_THERE
from converters.errors import CheckpointError, MalformedError, consistent, unreadable
from converters.source import Place, SourceTopology
from converters.storage import open_files
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state
from converters.zero.checkpoint import Checkpoint
from converters.zero.experts import expert_files, fused, groups, teams
from converters.zero.experts.groups import ExpertGroup
from converters.zero.files import all_ranks, discovery, several_models, state_files
from converters.zero.files.state_files import MAX_RANKS, State
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import Parameters, assemble


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> Checkpoint:
    """Locates every tensor, experts under the numbers that they have in the whole model.

    ``CheckpointError`` for what is damaged or incomplete, and for runs without ZeRO and
    experts with tensor or pipeline parallelism, which are not read.
    """
    place = discovery.find(path, tag) if complete else several_models.find(path, tag)
    try:
        with consistent(place.folder, "a file is damaged or of another save"):
            source = _read(place)
    except OSError as error:
        raise unreadable(error, place.folder) from error

    return replace(source, optimizer=partial(optimizer_state.read, source))


def _read(place: Place) -> Checkpoint:
    lanes = discovery.lanes(place)
    files = lanes[min(lanes)]
    if len(lanes) > 1 or not files.optimizer:
        raise _unsupported(place, lanes)

    optimizers = {rank: state_files.read(path) for rank, path in files.optimizer.items()}
    is_stage_3 = "fp32_flat_groups" in next(iter(optimizers.values())).optimizer
    paths = list(files.partitioned.values()) if is_stage_3 else [files.module]
    models = [state_files.read(path) for path in paths if path is not None]
    if not models:
        raise CheckpointError(
            f"{place.folder} has no model file; copy it from the save", "incomplete"
        )

    _refuse_others(place, [*models, *optimizers.values()])
    ranks = _in_rank_order(place, optimizers)
    if is_stage_3:
        all_ranks.require_ranks(place, len(ranks), files.partitioned, "model")
        parameters = teams.parameters(place.folder, models, ranks)
        return _checkpoint(place, 3, models, ranks, [], parameters)

    state_files.require_kinds(models, ranks)
    experts = expert_files.read(place, models[0])
    stage = ranks[0].optimizer.get("zero_stage")
    parameters = _parameters(models[0], ranks, experts)
    return _checkpoint(place, stage if stage in (1, 2) else 1, models, ranks, experts, parameters)


def _checkpoint(
    place: Place,
    stage: int,
    models: Sequence[State],
    ranks: Sequence[State],
    experts: Sequence[State],
    parameters: Parameters,
) -> Checkpoint:
    """The checkpoint of these files."""
    model, sources = models[0], [*models, *ranks, *experts]
    weights = quantized.marked(assemble(model, parameters, sources))
    step = model.root.get("global_steps")

    return Checkpoint(
        kind=EXPERTS,
        place=place,
        topology=SourceTopology(len(ranks), stage),
        precision=zero.precision(model, weights),
        step=step if isinstance(step, int) else None,
        version=model.version,
        files={state.path: state.file.digest for state in sources},
        weights=weights,
        entries=model.root,
        notes=tuple(parameters.notes),
        model=model,
        ranks=tuple(ranks),
        names=parameters.names,
    )


def _parameters(model: State, ranks: Sequence[State], experts: Sequence[State]) -> Parameters:
    """All parameters under the names of the whole model, with their 16-bit copies."""
    stored_experts = expert_files.tensors(experts)
    dense: dict[str, TensorRef] = {}
    trained_experts: dict[str, TensorRef] = {}
    fused_parts: dict[str, dict[int, TensorRef]] = {}
    placements = fused.placements(model)
    counts = expert_files.counts_by_prefix(stored_experts)

    for group in groups.read(model, ranks):
        for name, master in group.masters.items():
            if group.expert_rank is None:
                dense[name] = master
            elif name in placements:
                fused_parts.setdefault(name, {})[group.expert_rank] = master
            else:
                whole_name = _global_name(name, group, counts)
                trained_experts[whole_name] = master

    for name, parts in fused_parts.items():
        trained_experts[name] = placements[name].whole(parts)
    for name, placement in placements.items():
        copy = fused.stored(name, stored_experts, placement.count)
        if copy is None:
            raise MalformedError(f"the files of experts have not all of {name}")
        stored_experts |= {name: copy}
        for expert in range(placement.count):
            del stored_experts[f"{name}.{expert}"]

    return _joined(model, dense, trained_experts, stored_experts)


def _global_name(name: str, group: ExpertGroup, counts: Mapping[str, int]) -> str:
    """The name in the whole model of what an expert-parallel rank trains."""
    assert group.expert_rank is not None
    try:
        return expert_files.global_name(name, group.expert_rank, group.expert_ranks, counts)
    except ValueError as error:
        raise MalformedError(str(error)) from error


def _joined(
    model: State,
    dense: dict[str, TensorRef],
    trained_experts: Mapping[str, TensorRef],
    stored_experts: Mapping[str, TensorRef],
) -> Parameters:
    """The parameters of the model file with the experts."""
    unnamed = [name for name in dense if name not in model.module]
    if unnamed:
        raise CheckpointError(
            f"{model.path} lacks {unnamed[0]}, which is trained, in its state dict: a hook has "
            f"changed the names, which is not read of experts: {LOAD_THERE}",
            "unsupported",
        )

    shapes = state_files.shapes(model, "param_shapes")
    result = storage_views.complete(model, dense, shapes)
    for name, master in trained_experts.items():
        if name not in stored_experts or stored_experts[name].shape != master.shape:
            raise MalformedError(f"the files of experts have no {name} of the optimizer's shape")
        result.masters[name] = master
        result.copies[name] = stored_experts[name]

    # what no optimizer trains; the model file has those of the first expert-parallel rank
    for name, tensor in stored_experts.items():
        if name not in trained_experts:
            result.frozen[name] = tensor

    return result


def _in_rank_order(place: Place, optimizers: dict[int, State]) -> list[State]:
    """The optimizer files in rank order, of one save: groups may have another order on each."""
    counts = optimizers[min(optimizers)].optimizer.get("partition_count")
    by_group = counts if isinstance(counts, list) else [counts]
    numbers = [count for count in by_group if is_whole_number(count) and count < MAX_RANKS]
    all_ranks.require_ranks(place, max(numbers, default=len(optimizers)), optimizers, "optimizer")
    ranks = [optimizers[rank] for rank in sorted(optimizers)]
    expected = _progress(ranks[0])
    for state in ranks[1:]:
        for key, value in _progress(state).items():
            if value != expected.get(key):
                raise state.fail(
                    f"is of another save than {ranks[0].path.name}: its {key} is {value}, "
                    f"expected {expected.get(key)}; copy the file of this save here"
                )

    return ranks


def _progress(state: State) -> dict[str, object]:
    """What is the same on every rank, whatever the order of its groups."""
    return {
        key: value
        for key, value in state_files.progress(state).items()
        if key != "ranks" and " of group " not in key
    }


def _refuse_others(place: Place, states: Sequence[State]) -> None:
    """``CheckpointError`` for experts with model parallelism."""
    for state in states:
        model_ranks = state.root.get("mp_world_size")
        if is_whole_number(model_ranks, 2):
            raise CheckpointError(
                f"{place.folder} has experts on {model_ranks} model-parallel ranks; merging that "
                f"is not supported yet: {LOAD_THERE}",
                "unsupported",
            )


def _unsupported(place: Place, lanes: dict[int, discovery.Files]) -> CheckpointError:
    """The error for experts whose files are of another form than ZeRO writes."""
    reason = "has experts without ZeRO, whose optimizer state has no names"
    if len(lanes) > 1:
        reason = f"has experts on {len(lanes)} model-parallel ranks"
    return CheckpointError(
        f"{place.folder} {reason}; merging that is not supported yet: {LOAD_THERE}", "unsupported"
    )
