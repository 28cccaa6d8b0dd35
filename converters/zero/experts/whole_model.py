"""The model file as if the experts of all ranks were in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.tensors import TensorRef
from converters.zero.experts import auto_ep, expert_files
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import NATIVE
from converters.zero.files.state_files import State
from converters.zero.model_ranks.joined_source import with_module
from converters.zero.naming import storage_views


def copies_of(
    model: State, layers: Sequence[AutoEPLayer], tensors: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], list[str]]:
    """The experts' own weights by the names of the whole model, and how these begin."""
    # those of DeepSpeed-MoE in the order of the layers, in which the files are counted
    matches = [match for name in tensors if (match := NATIVE.fullmatch(name))]
    single_tensors = {match[0]: tensors[match[0]] for match in matches}
    parts = {name: ref for name, ref in tensors.items() if name not in single_tensors}
    stacks = auto_ep.stacks_of_files(model, layers, parts)
    prefixes = dict.fromkeys(match["prefix"] for match in matches)

    return {**single_tensors, **stacks}, [*prefixes, *(layer.prefix for layer in layers)]


def with_experts(
    model: State,
    layers: Sequence[AutoEPLayer],
    copies: Mapping[str, TensorRef],
    prefixes: Sequence[str],
) -> State:
    """The model file as if the experts were in it."""
    return with_module(
        model,
        expert_files.placed_among(model.module, copies, prefixes),
        shared_params=_shared(model, layers),
        buffer_names=_buffers(model, copies),
    )


def with_stacks(
    model: State, layers: Sequence[AutoEPLayer], stacks: Mapping[str, TensorRef]
) -> State:
    """A model file of stage 3 as if the stacks of all experts were in it."""
    prefixes = [layer.prefix for layer in layers]
    return with_module(model, expert_files.placed_among(model.module, stacks, prefixes))


def _shared(model: State, layers: Sequence[AutoEPLayer]) -> dict[str, str]:
    """The tied names that the model file records, and those that AutoEP makes."""
    shared_params = model.root.get("shared_params")
    recorded = shared_params if isinstance(shared_params, dict) else {}
    return {**recorded, **auto_ep.router_aliases(model, layers)}


def _buffers(model: State, copies: Mapping[str, TensorRef]) -> object:
    """The names of buffers, those of experts under their numbers over all ranks."""
    names = storage_views.buffer_names(model)
    local_parts = {
        (match["prefix"], match["inner"]) for name in names if (match := NATIVE.fullmatch(name))
    }
    if not local_parts:
        return model.root.get("buffer_names")

    return [
        *(name for name in names if NATIVE.fullmatch(name) is None),
        *(
            name
            for name in copies
            if (match := NATIVE.fullmatch(name))
            and (match["prefix"], match["inner"]) in local_parts
        ),
    ]
