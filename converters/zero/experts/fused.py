"""AutoEP's experts: those of a rank are one tensor, whose first axis counts them.

    rank 0   w1 (2, 8, 16): experts 0 and 1      rank 1   w1 (2, 8, 16): experts 2 and 3
    model    w1 (4, 8, 16)

Which experts a rank has is recorded (``expert_placement``). Source: DeepSpeed 0.19.8
``ds_autoep_layers`` of a model file (``runtime/engine.py``, ``module_inject/auto_ep.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.accessors import entry, is_whole_number, value
from converters.errors import MalformedError
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State

WEIGHTS = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """The experts of each expert-parallel rank of a layer, in the order of its tensors."""

    experts_by_rank: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """All experts of the layer."""
        return sum(map(len, self.experts_by_rank))

    def shape_on(self, expert_rank: int, shape: Shape) -> Shape:
        """The shape that a rank has of a tensor that another one has with ``shape``."""
        if expert_rank >= len(self.experts_by_rank):
            raise MalformedError(f"the experts of rank {expert_rank} are placed nowhere")
        return (len(self.experts_by_rank[expert_rank]), *shape[1:])

    def whole(self, parts: Mapping[int, TensorRef]) -> TensorRef:
        """All experts in order, from the tensors of the expert-parallel ranks."""
        if sorted(parts) != list(range(len(self.experts_by_rank))):
            raise MalformedError(
                f"there are experts of {len(parts)} ranks, expected {len(self.experts_by_rank)}"
            )

        boxes = []
        for rank, experts in enumerate(self.experts_by_rank):
            shape = parts[rank].shape
            for index, expert in enumerate(experts):
                origin = (0,) * (len(shape) - 1)
                box = parts[rank].box((index, *origin), (1, *shape[1:]))
                boxes.append(((expert, *origin), box))

        try:
            return TensorRef.tile((self.count, *parts[0].shape[1:]), boxes)
        except ValueError as error:
            raise MalformedError(str(error)) from error


def placements(model: State) -> dict[str, ExpertPlacement]:
    """Where the experts of each layer are, by the names of their tensors; empty without AutoEP."""
    layers = model.root.get("ds_autoep_layers") or []
    by_name: dict[str, ExpertPlacement] = {}
    for layer in value(layers, list, "ds_autoep_layers"):
        prefix = entry(layer, "expert_key_prefix", str)
        placement = _placement(layer)
        by_name |= {f"{prefix}.{weight}": placement for weight in WEIGHTS}

    return by_name


def module_paths(model: State) -> list[str]:
    """The names of the modules that have experts."""
    layers = value(model.root.get("ds_autoep_layers"), list, "ds_autoep_layers")
    return [entry(layer, "module_path", str) for layer in layers]


def expert_rank(model: State) -> int:
    """The expert-parallel rank that a model file of stage 3 is of."""
    layers = value(model.root.get("ds_autoep_layers"), list, "ds_autoep_layers")
    ranks = {entry(layer, "ep_rank", int) for layer in layers}
    if len(ranks) != 1:
        raise MalformedError("the layers of a model file are of several expert-parallel ranks")
    return ranks.pop()


def _placement(layer: Any) -> ExpertPlacement:
    count, rank_count = entry(layer, "num_experts", int), entry(layer, "ep_size", int)
    if not 1 <= rank_count <= count <= state_files.MAX_RANKS or count % rank_count:
        raise MalformedError(f"a layer has {count} experts on {rank_count} ranks")

    recorded = layer.get("expert_placement")
    if recorded is None:
        size = count // rank_count
        return ExpertPlacement(
            tuple(tuple(range(rank * size, (rank + 1) * size)) for rank in range(rank_count))
        )

    experts_by_rank: dict[int, tuple[int, ...]] = {}
    for item in entry(recorded, "ranks", list):
        experts = tuple(entry(item, "experts", list))
        if not all(is_whole_number(expert) for expert in experts):
            raise MalformedError(f"experts are {state_files.shown(experts)}, expected numbers")
        experts_by_rank[entry(item, "rank", int)] = experts

    in_order = tuple(experts_by_rank[rank] for rank in sorted(experts_by_rank))
    placed = sorted(expert for experts in in_order for expert in experts)
    if sorted(experts_by_rank) != list(range(rank_count)) or placed != list(range(count)):
        raise MalformedError(f"{count} experts are not each placed once on {rank_count} ranks")
    return ExpertPlacement(in_order)


def stored(name: str, tensors: Mapping[str, TensorRef], count: int) -> TensorRef | None:
    """The 16-bit experts of a tensor, from the files of each; ``None`` if one is missing."""
    refs: Sequence[TensorRef | None] = [tensors.get(f"{name}.{expert}") for expert in range(count)]
    if not refs or any(ref is None for ref in refs):
        return None

    present = [ref for ref in refs if ref is not None]
    shape = present[0].shape
    boxes = [
        ((expert, *(0,) * len(shape)), ref.view(1, *ref.shape))
        for expert, ref in enumerate(present)
    ]
    try:
        return TensorRef.tile((count, *shape), boxes)
    except ValueError as error:
        raise MalformedError(f"the files of the experts of {name} differ: {error}") from error
