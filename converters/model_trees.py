"""What a model file holds of the parameters, for any stage and world size.

    stages 1, 2   mp_rank_00: the module in the type that is computed in, the trained parameters as
                  views into one storage a group, at the elements where the optimizer has them
    stage 3       one a rank: placeholders, and a piece of each frozen parameter

Source: ``_common_checkpoint_state`` of DeepSpeed 0.19.8 ``runtime/engine.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from converters import layout, states, trees
from converters.groups import Group
from converters.optimizer_trees import Target, Tree
from converters.records import Record
from converters.tensors import DType, TensorRef
from converters.zero import Checkpoint

DECIDED = {  # what the layout decides in a model file; its tensors are proven as weights
    "module",
    "param_shapes",
    "dp_world_size",
    "shared_params",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "ds_config",
}


def trees_of(
    checkpoint: Checkpoint, models: Sequence[Path], groups: Sequence[Group], target: Target
) -> Iterator[Any]:
    """The root of each model file of the target.

    ``models`` are those of the source in rank order, each read when it is needed; rank r of stage 3
    is made from that of rank r modulo their number, so that what only a rank knows (its buffers) is
    kept.
    """
    common = _shared(groups, target)
    if target.stage < 3:
        root = trees.read(models[0]).root
        yield trees.replaced(root, common | _module12(checkpoint, root, groups, target))
        return
    frozen = {name: checkpoint.weights.tensors[name] for name in frozen_names(checkpoint)}
    for rank in range(target.world_size):
        root = trees.read(models[rank % len(models)]).root
        changed = dict(common)
        if checkpoint.stage < 3:
            changed["module"] = _placeholders(checkpoint, root)
        tied = root.get("shared_params") or dict(checkpoint.weights.aliases)
        changed["shared_params"] = tied if rank == 0 else {}
        pieces = [(n, layout.cut3(r, rank, target.world_size)) for n, r in frozen.items()]
        fragments = [(n, trees.tensor(trees.storage(r), r.shape)) for n, r in pieces]
        yield trees.replaced(root, changed | _frozen(checkpoint, fragments))


def _shared(groups: Sequence[Group], target: Target) -> Tree:
    """What is the same for all ranks: world size and the order of the parameters."""
    named: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        shapes |= group.shapes
        if target.stage < 3:
            named.append(target.order(group))
        else:
            cut = layout.sub_groups(group.shapes, target.world_size, target.sub_group_size)
            named += [list(names) for names in cut]
    return {
        "param_shapes": [
            trees.ordered((name, trees.size(shapes[name])) for name in names) for names in named
        ],
        "dp_world_size": target.world_size,
    }


def frozen_names(checkpoint: Checkpoint) -> list[str]:
    """The parameters without an optimizer, in the module's order: frozen, or without elements."""
    weights = checkpoint.weights
    return [name for name in weights.tensors if name in weights.frozen and not _extra(name)]


def _extra(name: str) -> bool:
    """Whether a name is what nn.Module.get_extra_state returned, which may be a tensor."""
    return name.endswith("_extra_state")


def _frozen(checkpoint: Checkpoint, fragments: Sequence[tuple[str, Record]]) -> Tree:
    """The frozen parameters' shapes and what a rank has of them, as stages 2 and 3 record them.

    ``None`` where the source says that they were left out, or knows of none.
    """
    root = checkpoint.model.root  # before 0.9.1 without that key; stage 1 has it, but no values
    excluded = checkpoint.stage > 1 and root.get("frozen_param_shapes", ()) is None
    if excluded or (checkpoint.stage < 2 and not fragments):
        return {"frozen_param_shapes": None, "frozen_param_fragments": None}
    tensors = checkpoint.weights.tensors
    return {
        "frozen_param_shapes": trees.ordered(
            (name, trees.size(tensors[name].shape)) for name, _ in fragments
        ),
        "frozen_param_fragments": trees.ordered(fragments),
    }


def _module12(checkpoint: Checkpoint, model: Any, groups: Sequence[Group], target: Target) -> Tree:
    """The module of stages 1 and 2, and the frozen parameters, which share its storages."""
    weights = checkpoint.weights
    views = _views(checkpoint, groups, target)
    for name in frozen_names(checkpoint) if checkpoint.stage == 3 else ():
        ref = weights.tensors[name]
        views[name] = trees.tensor(trees.storage(ref.view(ref.numel)), ref.shape)
    module = trees.pairs(model["module"])
    made = {name: views.get(weights.aliases.get(name, name), node) for name, node in module}
    changed = {"module": trees.replaced(model["module"], made)}
    fragments = [(n, node) for n in frozen_names(checkpoint) if (node := made.get(n)) is not None]
    if target.stage == 1:
        return changed | {"frozen_param_shapes": None, "frozen_param_fragments": None}
    return changed | _frozen(checkpoint, fragments)


def _views(checkpoint: Checkpoint, groups: Sequence[Group], target: Target) -> dict[str, Record]:
    """The trained parameters, as views into one storage for each group.

    Their values are those of the module or, where that is only placeholders, the master weights
    rounded.
    """
    module, views = checkpoint.model.module, {}
    for group in groups:
        names, paddings = target.order(group), target.paddings(group)
        held = {name: states.tensor(checkpoint.model, module[name], name) for name in names}
        dtype = held[names[0]].dtype
        if checkpoint.stage == 3:
            held = {name: checkpoint.weights.tensors[name] for name in names}
        runs = layout.cut12([held[name] for name in names], target.world_size, paddings)
        flat, at = trees.storage(TensorRef.concat(runs), dtype), 0
        for name, padding in zip(names, paddings, strict=True):
            views[name] = trees.tensor(flat, group.shapes[name], at)
            at += held[name].numel + padding
    return views


def _placeholders(checkpoint: Checkpoint, model: Any) -> Any:
    """The module of stage 3: nothing but buffers, and an empty storage for each parameter."""
    weights, empty = checkpoint.weights, dict[str, Record]()
    module = checkpoint.model.module
    made = {}
    for name, node in trees.pairs(model["module"]):
        owner = weights.aliases.get(name, name)
        held = module[name]
        if owner in weights.buffers or _extra(name) or not isinstance(held, TensorRef):
            made[name] = node
            continue
        if owner not in empty:
            empty[owner] = trees.tensor(trees.storage(_nothing(held.dtype)), (0,))
        made[name] = empty[owner]
    return trees.replaced(model["module"], made)


def _nothing(dtype: DType) -> TensorRef:
    return TensorRef(dtype, (0,), ())
