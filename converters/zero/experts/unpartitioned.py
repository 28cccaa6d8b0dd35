"""Experts trained without ZeRO:
the weights are in the model file and in those of experts.

    mp_rank_00_model_states.pt              everything but the experts
    layer_L_expert_E_mp_rank_00_...         the experts
    expp_rank_E_mp_rank_00_optim_states.pt  the optimizer of expert rank E, by number; of a
                                            training in 16 bits with the fp32 weights

Each optimizer has the states of the parameters that all ranks share, and of its own
experts, in param groups of their own. The order in a group is that of the model. Where
the shapes do not bear that out, or there are several groups of a kind, the states go
without names; fp32 weights have to round to the 16-bit ones besides. Sources: DeepSpeed
0.19.8 ``runtime/engine.py`` (``_save_moe_checkpoint``), ``runtime/fp16/unfused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place
from converters.tensors import TensorRef
from converters.zero.experts import auto_ep
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import NATIVE
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import folder_files, numbered_states, one_save
from converters.zero.model_ranks.numbered_states import NumberedStates
from converters.zero.naming import storage_views

Parameters = Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True)
class ExpertOptimizer:
    """The optimizer of an expert rank: what torch keeps, and the fp32 weights of each
    group, where the training was in 16 bits."""

    file: State
    torch_state: Section
    masters: tuple[list[TensorRef], ...] | None

    def groups(self, has_experts: bool) -> list[int]:
        """The numbers of the groups of experts, or of the others, that are not empty."""
        return [
            number
            for number, group in enumerate(self.torch_state.dicts("param_groups"))
            if group.get("params") and bool(group.get("moe")) is has_experts
        ]


@dataclass(frozen=True, slots=True)
class NamedOptimizers:
    """The states of all parameters by name,
    and the fp32 weights of a training in 16 bits."""

    states: NumberedStates
    masters: Mapping[str, TensorRef]


def optimizers(place: Place, paths: Mapping[int, Path]) -> list[ExpertOptimizer]:
    """Those of all expert ranks in order;
    ``CheckpointError`` for what keeps flat vectors."""
    one_save.require_numbered(place, "expp_rank_N_mp_rank_*_optim_states.pt", max(paths) + 1, paths)
    return of_paths(paths)


def of_paths(paths: Mapping[int, Path]) -> list[ExpertOptimizer]:
    """Those of some expert ranks, in their order."""
    return [_optimizer(folder_files.read(path)) for _, path in sorted(paths.items())]


def _optimizer(state: State) -> ExpertOptimizer:
    optimizer = Section(state.path, "optimizer", state.fields.required("optimizer", dict))
    if "param_groups" in optimizer.values:
        return ExpertOptimizer(state, optimizer, None)

    if "fp32_groups" not in optimizer.values:
        raise CheckpointError(
            f"{state.path} is of experts trained in 16 bits without ZeRO, by an optimizer that "
            f"joins its fp32 weights; merging these is not supported yet: {LOAD_THERE}",
            "unsupported",
        )

    groups = tuple(
        state_files.tensors(state, group, "fp32_groups")
        for group in optimizer.required("fp32_groups", list)
    )
    return ExpertOptimizer(state, optimizer.section("optimizer_state_dict"), groups)


def joined(first: NamedOptimizers, second: NamedOptimizers) -> NamedOptimizers:
    """Both as one; without states where one of them has none by name."""
    by_name = None
    if first.states.by_name is not None and second.states.by_name is not None:
        by_name = {**first.states.by_name, **second.states.by_name}
    states = NumberedStates(first.states.folder, by_name, {})
    return NamedOptimizers(states, {**first.masters, **second.masters})


def of_dense(
    folder: Path, optimizer_files: Sequence[ExpertOptimizer], dense: Parameters
) -> NamedOptimizers:
    """The states of what is no expert, which each of these optimizers has.

    ``dense`` are the weights in the order of the model. ``CheckpointError`` where fp32
    weights find no names.
    """
    states: dict[str, Mapping[Any, Any]] | None = {}
    masters: dict[str, TensorRef] = {}
    for optimizer in optimizer_files:
        numbers = optimizer.groups(has_experts=False)
        own_states = _states_in_order(optimizer, numbers, dense)
        masters = {**_masters_in_order(optimizer, numbers, dense), **masters}
        states = None if states is None or own_states is None else {**own_states, **states}

    return NamedOptimizers(NumberedStates(folder, states, {}), masters)


def of_experts(
    model: State,
    optimizer_files: Sequence[ExpertOptimizer],
    experts: Parameters,
    layers: Sequence[AutoEPLayer],
) -> NamedOptimizers:
    """The states of experts, each kept by the optimizers of one expert rank.

    ``experts`` are the weights by the names that they have in the whole model, in its
    order; ``layers`` are those of AutoEP. ``CheckpointError`` as for ``of_dense``, and
    where the file of an expert rank is missing.
    """
    _require_all(model, optimizer_files, experts, layers)
    local_states: dict[tuple[str, int], Mapping[Any, Any]] = {}
    local_masters: dict[tuple[str, int], TensorRef] = {}
    is_known = True

    for rank, optimizer in enumerate(optimizer_files):
        own_experts = _own(model, experts, layers, rank, len(optimizer_files))
        numbers = optimizer.groups(has_experts=True)
        own_states = _states_in_order(optimizer, numbers, own_experts)
        own_masters = _masters_in_order(optimizer, numbers, own_experts)
        is_known = is_known and own_states is not None
        local_states |= {(name, rank): state for name, state in (own_states or {}).items()}
        local_masters |= {(name, rank): master for name, master in own_masters.items()}

    states = {name: state for (name, _), state in local_states.items()}
    masters = {name: master for (name, _), master in local_masters.items()}
    if layers:
        states = _stacked_states(model, layers, local_states) if is_known else {}
        masters = auto_ep.whole_stacks(model, layers, local_masters)
    by_name = states if is_known else None
    return NamedOptimizers(NumberedStates(model.path.parent, by_name, {}), masters)


def _require_all(
    model: State,
    optimizer_files: Sequence[ExpertOptimizer],
    experts: Parameters,
    layers: Sequence[AutoEPLayer],
) -> None:
    """Raises if there are fewer optimizer files than the experts are dealt out to.

    How many that is only the layers of AutoEP say; else it is known where the first file
    has all parameters of its own experts.
    """
    count = max((len(layer.experts) for layer in layers), default=0)
    if not layers:
        first = optimizer_files[0]
        groups = first.torch_state.dicts("param_groups")
        own_count = sum(
            len(Section(first.file.path, "param_groups", groups[number]).numbers("params"))
            for number in first.groups(has_experts=True)
        )
        count, remainder = divmod(len(experts), own_count or 1)
        own_experts = _own(model, experts, layers, 0, count) if own_count else {}
        if (
            remainder
            or _states_in_order(first, first.groups(has_experts=True), own_experts) is None
        ):
            return

    if len(optimizer_files) < count:
        raise CheckpointError(
            f"{model.path.parent} has the optimizer files of {len(optimizer_files)} expert ranks "
            f"(expp_rank_N_mp_rank_00_optim_states.pt), its experts are dealt out to {count}; copy "
            "the others here from the save",
            "incomplete",
        )


def _stacked_states(
    model: State,
    layers: Sequence[AutoEPLayer],
    local_states: Mapping[tuple[str, int], Mapping[Any, Any]],
) -> dict[str, Mapping[Any, Any]]:
    """The states of stacked experts, from those of the expert ranks."""
    states: dict[str, dict[Any, Any]] = {}
    tensors_by_key: dict[Any, dict[tuple[str, int], TensorRef]] = {}
    for (name, rank), state in local_states.items():
        for key, value in state.items():
            if isinstance(value, TensorRef) and value.shape:
                tensors_by_key.setdefault(key, {})[name, rank] = value
            else:
                states.setdefault(name, {}).setdefault(key, value)

    for key, tensors in tensors_by_key.items():
        for name, tensor in auto_ep.whole_stacks(model, layers, tensors).items():
            states.setdefault(name, {})[key] = tensor

    return dict(states)


def _states_in_order(
    optimizer: ExpertOptimizer, numbers: Sequence[int], parameters: Parameters
) -> dict[str, Mapping[Any, Any]] | None:
    """The states of one group, or none, by name; ``None`` if the order is not shown."""
    groups = optimizer.torch_state.dicts("param_groups")
    if len(numbers) > 1:
        return None

    return numbered_states.in_order(
        [
            state
            for number in numbers
            for state in numbered_states.of_group(optimizer.torch_state, groups[number])
        ],
        list(parameters),
        [tensor.shape for tensor in parameters.values()],
    )


def _masters_in_order(
    optimizer: ExpertOptimizer, numbers: Sequence[int], parameters: Parameters
) -> dict[str, TensorRef]:
    """The fp32 weights of one group by name; none of a training in fp32.

    Each has to round to the 16-bit weights of its name. Reads their beginnings now.
    """
    if optimizer.masters is None:
        return {}

    masters = [master for number in numbers for master in optimizer.masters[number]]
    pairs = list(zip(parameters.items(), masters, strict=False))
    if (
        len(numbers) > 1
        or len(masters) != len(parameters)
        or not all(_is_rounded(tensor, master) for (_, tensor), master in pairs)
    ):
        raise CheckpointError(
            f"{optimizer.file.path}: the fp32 weights of a training without ZeRO have no names, "
            "and do not round to the 16-bit weights in the order of the model; load the "
            "checkpoint with DeepSpeed and save it under ZeRO, which records names",
            "unsupported",
        )

    return {name: master for (name, _), master in pairs}


def _is_rounded(tensor: TensorRef, master: TensorRef) -> bool:
    if tensor.shape != master.shape:
        return False
    return storage_views.same(master.view(master.numel), {"": (0, tensor.view(tensor.numel))})


def _own(
    model: State,
    experts: Parameters,
    layers: Sequence[AutoEPLayer],
    rank: int,
    rank_count: int,
) -> dict[str, TensorRef]:
    """The experts of an expert rank: those of each layer are dealt out in blocks.

    Those of AutoEP come as stacks, under the names of the whole ones.
    """
    if layers:
        return {
            name: auto_ep.local_stack(model, layer, experts[name], rank)
            for layer in layers
            for name in layer.names
            if name in experts
        }

    counts: dict[str, int] = {}
    for match in map(NATIVE.fullmatch, experts):
        if match is not None:
            counts[match["prefix"]] = max(counts.get(match["prefix"], 0), int(match["expert"]) + 1)

    own_weights = {}
    for name, tensor in experts.items():
        match = NATIVE.fullmatch(name)
        if match is None:
            continue
        if int(match["expert"]) * rank_count // counts[match["prefix"]] == rank:
            own_weights[name] = tensor

    return own_weights
