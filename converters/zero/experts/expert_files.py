"""The 16-bit weights of experts, each in a file of its own.

    layer_0_expert_3_mp_rank_00_model_states.pt
        DeepSpeed-MoE   blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.3.up.weight
        AutoEP          model.layers.1.mlp.experts.w1.3     2-D; the model stacks them: w1[3]

Experts are numbered over all ranks, and layers are counted among those with experts
(``num_experts`` of the model file has the experts of each). Source: DeepSpeed 0.19.8
``runtime/engine.py`` (``_save_moe_checkpoint``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from converters.accessors import is_whole_number
from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles

MAX_EXPERTS = 1 << 16  # of a layer; more than any model has, and few enough to count
NATIVE = LazyPattern(
    r"(?P<prefix>.*deepspeed_moe\.experts\.deepspeed_experts\.)(?P<expert>\d{1,9})(?P<inner>\..*)",
    re.DOTALL,
)
FUSED = LazyPattern(r"(?P<name>.*\.w[123])\.(?P<expert>\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """The contents of the files of experts, by name, and the files."""

    tensors: Mapping[str, TensorRef]
    states: tuple[State, ...]


def read(place: Place, files: FolderFiles, model: State) -> ExpertFiles:
    """The weights of all experts; ``CheckpointError`` unless every one of them is there."""
    counts = model.root.get("num_experts")
    if not isinstance(counts, list):
        raise CheckpointError(
            f"{model.path} has no list num_experts, which says how many "
            f"experts each layer has; {LOAD_THERE}",
            "unsupported",
        )
    if not all(is_whole_number(count, 1) and count <= MAX_EXPERTS for count in counts):
        raise model.fail(
            f"num_experts is {state_files.shown(counts)}, expected the number of experts of each "
            "layer"
        )

    layers = sorted({layer for layer, _, _ in files.experts})
    one_save.require_numbered(place, "layer_N_expert_*_model_states.pt", len(counts), layers)
    tensors: dict[str, TensorRef] = {}
    states = []
    for layer, count in enumerate(counts):
        experts = [expert for number, expert, _ in files.experts if number == layer]
        label = f"layer_{layer}_expert_N_mp_rank_00_model_states.pt"
        one_save.require_numbered(place, label, count, experts)

        for expert in range(count):
            expert_states = [
                folder_files.read(path)
                for key, path in sorted(files.experts.items())
                if key[:2] == (layer, expert)
            ]
            for name, tensor in _replicated(expert_states, expert).items():
                if name in tensors:
                    state = expert_states[0]
                    raise state.fail(f"has {name}, which the file of another layer has, too")
                tensors[name] = tensor
            states += expert_states

    return ExpertFiles(tensors, tuple(states))


def _replicated(states: Sequence[State], expert: int) -> dict[str, TensorRef]:
    """The tensors of an expert, which several tensor-parallel ranks may have written."""
    first, *replicas = [_tensors(state, expert) for state in states]
    for state, replica in zip(states[1:], replicas, strict=True):
        if _forms(replica) != _forms(first):
            raise state.fail(f"has other weights than {states[0].path.name}; two saves are mixed")

    return {
        name: replace(tensor, replicas=tuple(replica[name] for replica in replicas))
        for name, tensor in first.items()
    }


def _forms(tensors: Mapping[str, TensorRef]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _tensors(state: State, expert: int) -> dict[str, TensorRef]:
    """The tensors of one expert, each under a name with its number."""
    tensors = {}
    for name, value in state.root.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            continue
        if not name.isprintable():
            raise state_files.no_name(state, name)

        match = NATIVE.fullmatch(name) or FUSED.fullmatch(name)
        if match is None or int(match["expert"]) != expert:
            raise CheckpointError(
                f"{state.path} holds {name}, expected the weights of expert {expert}; give each "
                "file back its own name"
            )
        tensors[name] = value

    return tensors


def placed_among(
    module: Mapping[str, object], tensors: Mapping[str, object], prefixes: Sequence[str]
) -> dict[str, object]:
    """The model's names in order,
    with those of experts behind the others of their layers.

    ``prefixes`` are what the names of experts begin with; of each the part before
    ``.experts`` is the layer's.
    """
    behind: dict[str, list[str]] = {}
    ends: list[str] = []
    for prefix in prefixes:
        layer = prefix.partition(".experts")[0] + "."
        names = [name for name in tensors if name.startswith(prefix)]
        neighbours = [name for name in module if name.startswith(layer)]
        if neighbours:
            behind.setdefault(neighbours[-1], []).extend(names)
        else:
            ends += names

    ordered: dict[str, object] = {}
    for name, value in module.items():
        ordered[name] = value
        ordered |= {expert_name: tensors[expert_name] for expert_name in behind.get(name, ())}

    return ordered | {name: tensors[name] for name in ends} | {**tensors, **ordered}
