"""AutoEP: the experts of a layer stacked in three tensors, dealt out to expert ranks.

    w1 of the model             |- expert 0 -|- expert 1 -|- expert 2 -|- expert 3 -|
    w1 of ep rank 0 (local)     |- expert 0 -|- expert 1 -|
    w1 of ep rank 1 (local)                               |- expert 2 -|- expert 3 -|

Which experts an expert rank has is ``expert_placement`` of ``ds_autoep_layers`` in a
model file; they need not follow one another. ``param_shapes`` has the local shapes of
the rank that wrote it. Source: DeepSpeed 0.19.8 ``module_inject/auto_ep.py``,
``runtime/engine.py`` (``_save_moe_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from converters import words
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero.experts.expert_files import MAX_EXPERTS
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.files import state_files, typed
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.model_ranks.joined_source import with_module
from converters.zero.naming import storage_views

KEY = "ds_autoep_layers"
_FAMILIES = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class AutoEPLayer:
    """A layer of experts.

    ``path`` is the module's, ``prefix`` what the names of its experts begin with,
    ``experts`` which ones each expert rank has, in the order in which it stacks them.
    ``expert_rank`` is that of the rank that wrote the file.
    """

    path: str
    prefix: str
    experts: tuple[tuple[int, ...], ...]
    expert_rank: int

    @property
    def count(self) -> int:
        """The experts of all ranks."""
        return sum(map(len, self.experts))

    @property
    def names(self) -> list[str]:
        """The names of the stacked tensors."""
        return [f"{self.prefix}.{family}" for family in _FAMILIES]


def layers_of(model: State) -> list[AutoEPLayer]:
    """The layers that a model file records; none where AutoEP did not make them."""
    if not model.root.get(KEY):
        return []
    return [_layer(Section(model.path, KEY, entry)) for entry in model.fields.dicts(KEY)]


def _layer(entry: Section) -> AutoEPLayer:
    count = entry.required("num_experts", int)
    placement = entry.optional("expert_placement", dict)
    if not 0 < count <= MAX_EXPERTS:
        raise CheckpointError(f"{entry.path}: {KEY} has a layer of {count} experts")

    if placement is None:  # in blocks, as before experts could be placed
        local_count = entry.required("num_local_experts", int)
        ranks = [
            range(start, start + local_count) for start in range(0, count, max(local_count, 1))
        ]
        experts = tuple(tuple(block) for block in ranks)
    else:
        members = Section(entry.path, "expert_placement", placement).dicts("ranks")
        sections = [Section(entry.path, "expert_placement", member) for member in members]
        by_rank = {
            section.required("rank", int): tuple(section.numbers("experts")) for section in sections
        }
        experts = tuple(by_rank.get(rank, ()) for rank in range(len(sections)))

    if sorted(expert for local in experts for expert in local) != list(range(count)):
        raise CheckpointError(
            f"{entry.path}: {KEY} places the experts {typed.shown(experts)}, expected each of "
            f"{count} on one rank"
        )

    rank = entry.required("ep_rank", int)
    if not 0 <= rank < len(experts):
        raise CheckpointError(f"{entry.path}: {KEY} has the expert rank {rank} of {len(experts)}")
    path, prefix = entry.required("module_path", str), entry.required("expert_key_prefix", str)
    return AutoEPLayer(path, prefix, experts, rank)


def local_shapes(
    model: State,
    layers: Sequence[AutoEPLayer],
    shapes: Mapping[str, Shape],
    expert_rank: int,
    group: SharedGroup,
) -> dict[str, Shape]:
    """The shapes that an expert rank has,
    from those of the rank that wrote ``param_shapes``.

    Those of DeepSpeed-MoE are the same on every rank.
    """
    local = dict(shapes)
    for layer in layers:
        for name in layer.names:
            if name not in shapes:
                continue
            if len(layer.experts) != group.expert_ranks:
                raise model.fail(
                    f"{name} is dealt out to {group.expert_ranks} expert ranks, but {KEY} places "
                    f"it on {len(layer.experts)}"
                )
            require_stack(model, layer, name, shapes[name])
            local[name] = (len(layer.experts[expert_rank]), *shapes[name][1:])

    return local


def require_stack(model: State, layer: AutoEPLayer, name: str, shape: Shape) -> None:
    """Raises unless a shape is that of the experts
    of the rank that wrote the model file."""
    count = len(layer.experts[layer.expert_rank])
    if shape[:1] != (count,):
        raise model.fail(
            f"param_shapes has {name} as {words.shape(shape)}, expected a stack of {count} experts"
        )


def whole_stacks(
    model: State, layers: Sequence[AutoEPLayer], local_weights: Mapping[tuple[str, int], TensorRef]
) -> dict[str, TensorRef]:
    """The stacked weights of all experts, from those of the expert ranks.

    ``CheckpointError`` for weights that no layer has, or a rank that has none.
    """
    result: dict[str, TensorRef] = {}
    names_left = dict.fromkeys(name for name, _ in local_weights)
    for layer in layers:
        for name in layer.names:
            if name not in names_left:
                continue

            del names_left[name]
            parts = {rank: local_weights.get((name, rank)) for rank in range(len(layer.experts))}
            result[name] = _stack(model, layer, name, parts)

    if names_left:
        raise CheckpointError(
            f"{model.path}: {words.some(names_left)} is in a param group of experts, and no layer "
            f"of {KEY} has it",
            "unsupported",
        )

    return result


def _stack(
    model: State, layer: AutoEPLayer, name: str, parts: Mapping[int, TensorRef | None]
) -> TensorRef:
    """The experts in their order, each out of the stack of its rank."""
    by_expert: dict[int, TensorRef] = {}
    inner_shape: Shape = ()
    for rank, experts in enumerate(layer.experts):
        part = parts[rank]
        if part is None or part.shape[:1] != (len(experts),):
            raise model.fail(
                f"expert rank {rank} has {name} as "
                f"{words.shape(part.shape) if part is not None else 'none'}, expected a stack of "
                f"{len(experts)} experts"
            )

        inner_shape = part.shape[1:]
        numel = prod(inner_shape)
        for index, expert in enumerate(experts):
            by_expert[expert] = part.narrow(index * numel, numel)

    stack = TensorRef.concat(by_expert[expert] for expert in range(layer.count))
    return stack.view(layer.count, *inner_shape)


def local_stack(model: State, layer: AutoEPLayer, stack: TensorRef, rank: int) -> TensorRef:
    """The experts of an expert rank, out of a stack of all."""
    if rank >= len(layer.experts):
        raise model.fail(f"{KEY} places experts on {len(layer.experts)} ranks, but there are more")

    inner_shape = stack.shape[1:]
    numel = prod(inner_shape)
    experts = layer.experts[rank]
    parts = [stack.narrow(expert * numel, numel) for expert in experts]
    return TensorRef.concat(parts).view(len(experts), *inner_shape)


def stacks_of_files(
    model: State, layers: Sequence[AutoEPLayer], tensors: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """The 16-bit weights of all experts, stacked from the files of single ones."""
    result: dict[str, TensorRef] = {}
    names_left = dict.fromkeys(tensors)
    for layer in layers:
        for name in layer.names:
            parts = [
                tensor
                for expert in range(layer.count)
                if (tensor := tensors.get(f"{name}.{expert}")) is not None
            ]
            if not parts:  # frozen, and left out by exclude_frozen_parameters
                continue
            if len(parts) != layer.count or len({(ref.shape, ref.dtype) for ref in parts}) != 1:
                raise model.fail(
                    f"the files of experts have {name} of {len(parts)} experts, expected "
                    f"{layer.count} of one shape; they are of another model"
                )
            for expert in range(layer.count):
                del names_left[f"{name}.{expert}"]
            result[name] = _whole_stack(parts)

    if names_left:
        raise model.fail(
            f"the files of experts have {words.some(names_left)}, which no layer of {KEY} has"
        )

    return result


def _whole_stack(parts: Sequence[TensorRef]) -> TensorRef:
    """Experts one after another, and as often again as tensor-parallel ranks wrote them."""
    stack, *replicas = [
        TensorRef.concat((part, *part.replicas)[min(turn, len(part.replicas))] for part in parts)
        for turn in range(1 + max(len(part.replicas) for part in parts))
    ]
    whole_stack = replace(stack, replicas=tuple(replicas))
    return whole_stack.view(len(parts), *parts[0].shape)


def in_optimizer_order(
    layers: Sequence[AutoEPLayer], parameters: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """Parameters that are no experts,
    as AutoEP gives them to the optimizer: routers last.

    They are so in every checkpoint seen (``param_shapes`` of 0.19.8, stages 1 to 3).
    """
    prefixes = tuple(f"{layer.path}.router." for layer in layers)
    routers = {name: ref for name, ref in parameters.items() if name.startswith(prefixes)}
    return {**{name: ref for name, ref in parameters.items() if name not in routers}, **routers}


def as_whole(model: State) -> State:
    """A model file as if one rank had had all experts,
    for states that were merged already.

    ``param_shapes`` has the whole stacks then, and nothing speaks of expert ranks. A
    model file without AutoEP stays as it is.
    """
    layers = layers_of(model)
    shapes = state_files.shapes(model, "param_shapes")
    if not layers or shapes is None:
        return model

    for layer in layers:
        for group in shapes:
            for name in layer.names:
                if name in group:
                    require_stack(model, layer, name, group[name])
                    group[name] = (layer.count, *group[name][1:])

    shared_params = model.root.get("shared_params")
    recorded = shared_params if isinstance(shared_params, dict) else {}
    return with_module(
        model,
        model.module,
        param_shapes=shapes,
        shared_params={**recorded, **router_aliases(model, layers)},
        num_experts=[],
        **{KEY: None},
    )


def router_aliases(model: State, layers: Sequence[AutoEPLayer]) -> dict[str, str]:
    """Second names of routers, as ``gate.gate.weight`` for ``router.gate.weight``.

    AutoEP registers a router under the name that the model had for it, too
    (``auto_ep_layer.py``: ``setattr(self, alias_target, self.router)``), so that a child
    of the layer has the names of the router, and none of its own is trained.
    """
    aliases: dict[str, str] = {}
    trained = {name for group in state_files.shapes(model, "param_shapes") or () for name in group}
    for layer in layers:
        inner_names: dict[str, set[str]] = {}
        for name in model.module:
            if name.startswith(f"{layer.path}."):
                child, _, inner_name = name.removeprefix(f"{layer.path}.").partition(".")
                inner_names.setdefault(child, set()).add(inner_name)

        router_names = inner_names.pop("router", set())
        for child, names in inner_names.items():
            pairs = {
                f"{layer.path}.{child}.{name}": f"{layer.path}.router.{name}" for name in names
            }
            is_router = names == router_names and not trained & pairs.keys()
            if is_router and all(_is_same(model, *pair) for pair in pairs.items()):
                aliases |= pairs

    return aliases


def _is_same(model: State, name: str, router_name: str) -> bool:
    """Whether two tensors are alike; stage 3 has none to compare. Reads beginnings now."""
    tensor, router = model.module[name], model.module[router_name]
    if not isinstance(tensor, TensorRef) or not isinstance(router, TensorRef):
        return False
    if (tensor.shape, tensor.dtype) != (router.shape, router.dtype):
        return False
    return storage_views.begins(tensor, tensor.dtype) == storage_views.begins(router, router.dtype)
