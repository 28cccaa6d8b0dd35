"""The 16-bit experts, which lie in a file for each layer and expert.

    layer_L_expert_E_mp_rank_00_model_states.pt     {name with the number E: tensor}

L counts the layers with experts, E the experts of all ranks. Source: DeepSpeed 0.19.8
``runtime/engine.py`` (``_save_moe_checkpoint``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.source import Place
from converters.storage import misplaced_files, stores
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import State

FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
NAME = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)", re.DOTALL)


def read(place: Place, model: State) -> list[State]:
    """The files of all experts, by layer and expert; ``CheckpointError`` for missing ones."""
    matches = [match for name in stores.names(place.folder) if (match := FILE.fullmatch(name))]
    present = {(int(match[1]), int(match[2])): place.folder / match[0] for match in matches}
    counts = model.root.get("num_experts")
    if not isinstance(counts, list) or not all(is_whole_number(count) for count in counts):
        raise model.fail(f"num_experts is {state_files.shown(counts)}, expected a list of numbers")

    layers = sorted({layer for layer, _ in present} | set(range(len(counts))))
    for layer in layers:
        count = counts[layer] if layer < len(counts) else 0
        experts = {expert for own_layer, expert in present if own_layer == layer}
        if experts != set(range(min(count, state_files.MAX_RANKS))):
            raise CheckpointError(
                f"{place.folder} has {len(experts)} files of the experts of layer {layer}, "
                f"expected {count}; copy them here from the save"
                f"{misplaced_files.missing(place.folder)}",
                "incomplete",
            )

    return [state_files.read(present[key]) for key in sorted(present)]


def tensors(files: Sequence[State]) -> dict[str, TensorRef]:
    """The experts' tensors by their names in the whole model."""
    by_name: dict[str, TensorRef] = {}
    for file in files:
        for name, value in file.root.items():
            if isinstance(value, TensorRef) and isinstance(name, str):
                if name in by_name:
                    raise file.fail(f"{name} is in another expert's file, too")
                by_name[name] = value

    return by_name


def counts_by_prefix(names: Mapping[str, object]) -> dict[str, int]:
    """How many experts each layer of DeepSpeed-MoE has, by what their names begin with."""
    counts: dict[str, int] = {}
    for name in names:
        if match := NAME.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)

    return counts


def global_name(name: str, expert_rank: int, expert_ranks: int, counts: Mapping[str, int]) -> str:
    """The name in the whole model of what an expert-parallel rank calls by its own number.

    ``ValueError`` for a name that is no expert's, or a number that the rank cannot have.
    """
    match = NAME.fullmatch(name)
    count = counts.get(match[1], 0) if match else 0
    if match is None or not count or count % expert_ranks:
        raise ValueError(f"{name} is no expert of a layer that has files")

    local_count = count // expert_ranks
    if int(match[2]) >= local_count:
        raise ValueError(f"{name} is no expert of {local_count} on each rank")
    return f"{match[1]}{expert_rank * local_count + int(match[2])}{match[3]}"
