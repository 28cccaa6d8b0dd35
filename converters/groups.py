"""Param groups as the optimizer has them: what a topology is made from, and what it is made of.

Every parameter's master weights and every per-element state of it, located, whatever stage and
world size they are cut up for. What an optimizer keeps for each element lies in its files exactly
as the master weights do (``layout``); the names of the state come from the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from converters import layout, muon, states, zero3
from converters.errors import CheckpointError
from converters.states import Shape, State
from converters.tensors import TensorRef
from converters.zero import Checkpoint

WEIGHTS = ""  # the name that the master weights have among the states
_ANEW = (
    "it cannot be cut up for other ranks; start the optimizer anew from the weights of ckpt to-fp32"
)


@dataclass(frozen=True, slots=True)
class Group:
    """A param group.

    ``shapes`` are in the order in which the optimizer was given the parameters. ``values`` has the
    master weights, under ``WEIGHTS``, and each state by name and parameter; ``constants`` what is
    kept once (``step``), and ``options`` the learning rate and so on (``None`` in an elastic
    checkpoint, which has none), both as trees. ``keys`` is the order of the states.
    """

    shapes: Mapping[str, Shape]
    values: Mapping[str, Mapping[str, TensorRef]]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] | None
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        for key, held in self.values.items():
            unlike = [n for n, shape in self.shapes.items() if held[n].shape != tuple(shape)]
            if unlike or held.keys() != self.shapes.keys():
                raise ValueError(f"{key or 'weights'} are not those of the parameters: {unlike}")


def read(checkpoint: Checkpoint, tree: Any) -> list[Group]:
    """The groups of a checkpoint; ``tree`` is rank 0's optimizer file (``trees.read``).

    ``CheckpointError`` if something is kept that is neither per element nor a constant.
    """
    optimizer = tree["optimizer_state_dict"]
    if checkpoint.stage == 3:
        return list(_stage3(checkpoint, optimizer))
    return list(_stage12(checkpoint, optimizer))


def _stage12(checkpoint: Checkpoint, tree: Any) -> Iterator[Group]:
    ranks = checkpoint.ranks
    shapes = _shapes(checkpoint.model)
    plain = checkpoint.bf16_optimizer  # neither deals parameters out nor aligns them
    shuffled = checkpoint.model.setting("zero_optimization", "round_robin_gradients") is True
    shuffled = shuffled and not plain
    whole = muon.whole(checkpoint.model) and not plain
    aligned = ranks[0].optimizer.get("param_alignment_paddings") or [()] * len(shapes)
    nodes, options = _kept(tree["base_optimizer_state"])
    kept = [_kept(state.optimizer["base_optimizer_state"])[0] for state in ranks]
    for index, named in enumerate(shapes):
        paddings = aligned[index] if any(aligned[index]) else ()
        masters = [s.optimizer["single_partition_of_fp32_groups"][index] for s in ranks]
        padded = [s.optimizer.get("group_paddings") or [0] * len(shapes) for s in ranks]
        full = [m.numel + padding[index] for m, padding in zip(masters, padded, strict=True)]
        if plain:  # the weights are kept with the padding
            full = [master.numel for master in masters]
            masters = _lean(masters, sum(prod(shape) for shape in named.values()))
        held = [by_group[index] for by_group in kept]
        where = f"group {index}"
        momenta: Sequence[TensorRef] = ()
        if whole and options and muon.uses(options[index]):
            momenta = _momenta(checkpoint, where, masters, held, named, paddings)
            held = [{k: v for k, v in of.items() if k != muon.MOMENTUM} for of in held]
        flats = _flats(checkpoint, where, masters, full, held)
        if momenta:
            flats[muon.MOMENTUM] = list(momenta)
        names = layout.dealt_back(list(named), len(ranks)) if shuffled else list(named)
        yield Group(
            {name: named[name] for name in names},
            {key: dict(layout.stage12(held, named, paddings)) for key, held in flats.items()},
            {key: value for key, value in nodes[index].items() if key not in flats},
            _without(options[index]) if options else None,
            tuple(nodes[index]),
        )


def _lean(masters: Sequence[TensorRef], numel: int) -> list[TensorRef]:
    """The partitions of a group of ``numel`` elements without the padding at its end."""
    found, left = [], numel
    for master in masters:
        found.append(master.narrow(0, min(left, master.numel)))
        left -= found[-1].numel
    return found


def _momenta(
    checkpoint: Checkpoint,
    where: str,
    masters: Sequence[TensorRef],
    kept: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Shape],
    paddings: Sequence[int],
) -> list[TensorRef]:
    """Muon's momentum for the elements of each rank; none where no step was taken yet.

    ``CheckpointError`` if the ranks do not keep what ``muon`` says, or not the same.
    """
    run = masters[0].numel  # less than the partition only where no other rank has any
    parts = [muon.parts(shapes, rank * run, run, paddings) for rank in range(len(masters))]
    found = [state.get(muon.MOMENTUM) for state in kept]
    held = [buffer for buffer in found if isinstance(buffer, TensorRef)]
    if not held:
        return []
    none = layout.zeros(held[0].dtype, 0)  # what a rank has that has padding alone
    buffers = [buffer if isinstance(buffer, TensorRef) else none for buffer in found]
    for state, buffer, mine in zip(checkpoint.ranks, buffers, parts, strict=True):
        muon.require_whole(state.path, where, buffer, shapes, mine, _ANEW)
    own = [
        muon.own(buffer, shapes, mine, master.numel)
        for buffer, mine, master in zip(buffers, parts, masters, strict=True)
    ]
    joined = dict(layout.stage12(own, shapes, paddings))
    for state, buffer, mine in zip(checkpoint.ranks, buffers, parts, strict=True):
        for name, copy in muon.copies(buffer, shapes, mine):
            if not muon.same(copy, joined[name]):
                raise CheckpointError(
                    f"{state.path}: Muon's {muon.MOMENTUM} of {name} is not that of the other "
                    f"ranks that have parts of it: {_ANEW}",
                    "unsupported",
                )
    return own


def _stage3(checkpoint: Checkpoint, tree: Any) -> Iterator[Group]:
    ranks = checkpoint.ranks
    shapes = _shapes(checkpoint.model)
    nodes = tree["optimizer_state_dict"]["state"]
    whole = tree["optimizer_state_dict"]["param_groups"]
    kept = [state.optimizer["optimizer_state_dict"]["state"] for state in ranks]
    flats = [state.optimizer["fp32_flat_groups"] for state in ranks]
    members = [group["params"] for group in whole]
    if [index for group in members for index in group] != list(range(len(shapes))):
        raise ranks[0].fail(f"its param groups hold {members}, expected {len(shapes)} sub-groups")
    for options, indices in zip(whole, members, strict=True):
        order: dict[str, Shape] = {}
        values: dict[str, dict[str, TensorRef]] = {}
        for index in indices:
            length = layout.length3(shapes[index], len(ranks))
            place, masters, held = checkpoint.place.folder, [], []
            for rank, (state, groups, state_of) in enumerate(zip(ranks, flats, kept, strict=True)):
                where = (place, state, rank, index, groups[index])
                masters.append(zero3.vector(*where, length))
                held.append(zero3.kept(*where, state_of.get(index, {}), length))
            found = _flats(checkpoint, f"sub-group {index}", masters, [length] * len(ranks), held)
            first = kept[0].get(indices[0], {})
            if held[0].keys() != first.keys() or any(
                states.scalar(first[key]) != states.scalar(held[0][key])
                for key in first
                if key not in found
            ):
                raise CheckpointError(
                    f"{ranks[0].path}: sub-group {index} has other state, or another step, than "
                    f"sub-group {indices[0]} of the same param group; it cannot be cut up anew",
                    "unsupported",
                )
            order |= shapes[index]
            for key, vectors in found.items():
                values.setdefault(key, {}).update(layout.stage3(vectors, shapes[index]))
        if order:
            node = nodes.get(indices[0], {})
            once = {key: value for key, value in node.items() if key not in values}
            yield Group(order, values, once, _without(options), tuple(node))


def _without(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "params"}


def _shapes(model: State) -> list[dict[str, Shape]]:
    found = states.shapes(model, "param_shapes")
    if found is None or not isinstance(model.root.get("param_shapes"), list):
        raise CheckpointError(
            f"{model.path} was saved by DeepSpeed {model.version or 'before 0.4.2'}, which records "
            "no param_shapes by group here; resharding needs 0.6.0 or later",
            "unsupported",
        )
    return found


def _kept(found: Any) -> tuple[list[Any], list[Any] | None]:
    """The state of each group, and the param groups: a list (elastic), or a dict with both."""
    if isinstance(found, list):
        return found, None
    groups = found["param_groups"]
    if any(len(group["params"]) != 1 for group in groups):
        raise ValueError("a param group has not one flat parameter")
    return [found["state"].get(group["params"][0], {}) for group in groups], groups


def _flats(
    checkpoint: Checkpoint,
    where: str,
    masters: Sequence[TensorRef],
    full: Sequence[int],
    kept: Sequence[Mapping[str, Any]],
) -> dict[str, list[TensorRef]]:
    """The weights and each per-element state of a group: the vectors of all ranks.

    ``full`` are the lengths of the ranks' vectors with the padding that the state has, and the
    weights have not. What is left out is the same on every rank: a constant.
    """
    flats: dict[str, list[TensorRef]] = {WEIGHTS: list(masters)}
    if any(state.keys() != kept[0].keys() for state in kept):
        raise CheckpointError(
            f"{checkpoint.place.folder}: the ranks keep unlike optimizer state of {where}; files "
            "are of different saves"
        )
    for key in kept[0]:
        found = [state[key] for state in kept]
        if not any(_per_element(value, length) for value, length in zip(found, full, strict=True)):
            if len({repr(states.scalar(value)) for value in found}) != 1:
                raise CheckpointError(
                    f"{checkpoint.place.folder}: the ranks have unlike {key} of {where}; files "
                    "are of different saves"
                )
            continue
        flats[key] = []
        for rank, (value, master, length) in enumerate(zip(found, masters, full, strict=True)):
            numel = value.numel if isinstance(value, TensorRef) else 0
            if numel not in (master.numel, length):
                raise CheckpointError(
                    f"{checkpoint.ranks[rank].path}: the optimizer's {key} of {where} has {numel} "
                    f"elements, its weights {master.numel}: it is not kept for each element, so "
                    + _ANEW,
                    "unsupported",
                )
            flats[key].append(value.narrow(0, master.numel))
    return flats


def _per_element(value: Any, length: int) -> bool:
    """Whether a value belongs to elements: a tensor that is no number, 0-dim or alone in one."""
    return isinstance(value, TensorRef) and bool(value.shape) and (value.numel != 1 or length == 1)
