"""Proof of a conversion to or from the universal format: by place, as ``retrace`` proves.

The finished files are read again, by a reader that knows nothing of the plan, and everything that
it finds is traced through the plan to the bytes it was made from. These must be the very bytes that
the source has for it; what is no tensor is compared by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import (
    groups,
    model_trees,
    optimizer_trees,
    reshard,
    retrace,
    trees,
    universal,
    zero,
)
from converters.errors import CheckpointError
from converters.groups import Group
from converters.optimizer_trees import SCALING, Target, scaled
from converters.plan import Plan
from converters.records import Record
from converters.retrace import Retrace
from converters.tensors import DType, TensorRef
from converters.universal import INFO, Universal
from converters.universal.planning import (
    LAYOUT,
    SHARDED,
    VERSION,
    common,
    native_tag,
    parameter_files,
    universal_tag,
    whole_of,
)
from converters.zero import Checkpoint


def to_universal(source: Checkpoint, plan: Plan, folder: Path) -> dict[str, int]:
    """Counts of tensors that are equal; ``CheckpointError`` names the first thing that is not."""
    made = universal.read(folder / universal_tag(source))
    inner = made.checkpoint.place.folder / "zero"
    tree = trees.read(source.ranks[0].path).root
    held = optimizer_trees.as_given(groups.read(source, tree), source, whole_of(source))
    back = Retrace(plan, folder)
    counts = _same(back, source, held, made.checkpoint, made.groups)
    retrace.prove_rest(back, common(tree, held), made.common, set(), inner)
    for name, stem, root in parameter_files(source, held):
        path = inner / name / f"{stem}.pt"
        retrace.prove_rest(back, {"it": root}, {"it": trees.read(path).root}, set(), path)
    one = {INFO: VERSION} | dict(trees.read(source.model.path).root)
    whole = made.models[0]
    for path in (whole, whole.with_name(f"zero_pp_rank_0_{whole.name}")):
        retrace.prove_rest(back, one, trees.read(path).root, model_trees.DECIDED, path)
    return counts


def from_universal(source: Universal, wanted: Target, plan: Plan, folder: Path) -> dict[str, int]:
    """Counts of tensors that are equal; ``CheckpointError`` names the first thing that is not."""
    made = zero.read(folder / native_tag(source))
    if (made.stage, made.world_size) != (wanted.stage, wanted.world_size):
        raise CheckpointError(f"{folder} reads as stage {made.stage} of {made.world_size}")
    held = groups.read(made, trees.read(made.ranks[0].path).root)
    back = Retrace(plan, folder)
    before = optimizer_trees.as_given(source.groups, source.checkpoint, wanted)
    counts = _same(back, source.checkpoint, before, made, held)
    decided = SHARDED | LAYOUT | {"clip_grad", "ds_version"}
    decided |= set(SCALING) if wanted.bf16 else set()
    for state in made.ranks:
        root = trees.read(state.path).root
        inner = scaled(source.common), root["optimizer_state_dict"]
        retrace.prove_rest(back, *inner, decided, state.path)
    for rank, path in enumerate(reshard.model_paths(made)):
        one = trees.read(source.models[rank % len(source.models)]).root
        retrace.prove_rest(back, one, trees.read(path).root, model_trees.DECIDED | {INFO}, path)
    return counts


def _same(
    back: Retrace,
    source: Checkpoint,
    before: Sequence[Group],
    made: Checkpoint,
    after: Sequence[Group],
) -> dict[str, int]:
    """Proves groups and weights, as trees with one entry for each tensor."""
    path = made.place.folder
    if len(before) != len(after):
        raise CheckpointError(f"{path} has {len(after)} param groups, the source {len(before)}")
    for group, other in zip(before, after, strict=True):
        retrace.prove_rest(back, _group(group), _group(other), set(), path)
    trained = {name for group in before for name in group.shapes}
    one, two = _others(source, trained), _others(made, trained)
    retrace.prove_rest(back, one, two, set(), path)
    retrace.prove_rest(back, _copies(made, source), _copies(made, made), set(), path)
    return {
        "parameters": len(trained),
        "states": sum(len(held) for group in before for key, held in group.values.items() if key),
        "others": len(source.weights.tensors.keys() - trained),
        "copies": len(made.weights.copies),
    }


def _group(group: Group) -> dict[str, Any]:
    """A param group: its order, its options and constants, and every tensor under its name."""
    tensors = {
        f"{key or 'fp32'} of {name}": _tree(ref)
        for key, held in group.values.items()
        for name, ref in held.items()
    }
    kept = {"the order of parameters": list(group.shapes), "options": group.options}
    return {**kept, "constants": dict(group.constants), **tensors}


def _others(held: Checkpoint, trained: set[str]) -> dict[str, Any]:
    """What is not trained, and what names are."""
    weights = held.weights
    named: dict[str, Any] = {
        "tied names": sorted(weights.aliases.items()),
        "names of buffers": sorted(weights.buffers),
        "frozen names": sorted(weights.frozen - trained),
    }
    return named | {name: _tree(r) for name, r in weights.tensors.items() if name not in trained}


def _copies(made: Checkpoint, held: Checkpoint) -> Mapping[str, Any]:
    """What the 16-bit weights of ``made`` were made from, if they were made from ``held``."""
    weights = held.weights
    return {
        f"16-bit {name}": _tree(weights.copies.get(name, weights.tensors[name]), copy.dtype)
        for name, copy in made.weights.copies.items()
    }


def _tree(ref: TensorRef, dtype: DType | None = None) -> Record:
    return trees.tensor(trees.storage(ref, dtype), ref.shape)
