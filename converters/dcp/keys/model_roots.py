"""The keys that a model's names follow in a state dict,
where there may be several models.

A model belongs to the optimizer that stands beside it, under the same keys:

    app | model | NAME      app | optim | ...      the model that is trained
    ema | model | NAME                             another, which no optimizer stands beside

Where two models, or two trainings, could be meant, none is taken: an error lists them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from converters.dcp.keys.leaves import KeyPath, Leaf
from converters.errors import CheckpointError
from converters.names.rules import WRAPPERS

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module")
STATE, GROUPS = "state", "param_groups"


class OptimizerPlace(NamedTuple):
    """Where a leaf stands in an optimizer: ``parent`` are the keys of the training,
    ``base`` those of the optimizer in it, ``below`` those from ``state`` or
    ``param_groups`` on; none for what else an optimizer has."""

    parent: KeyPath
    base: KeyPath
    below: KeyPath


def choose(tensors: Sequence[Leaf], places: Sequence[OptimizerPlace], folder: Path) -> KeyPath:
    """The keys that the model's names follow: none where these stand at the root.

    ``tensors`` are those of no optimizer. ``CheckpointError`` lists the models where
    several could be meant.
    """
    parents = dict.fromkeys(place.parent for place in places)
    if len(parents) > 1:
        raise CheckpointError(
            f"{folder} has optimizers of several trainings, under {_listed(parents)}, expected "
            "one; save each training with its model into a folder of its own",
            "unsupported",
        )

    roots = _roots(tensors)
    if not roots:
        return _holder(tensors, places, folder)
    if parents:
        return _beside_optimizer(roots, next(iter(parents)), tensors, places, folder)
    depth = min(map(len, roots))
    return _only([root for root in roots if len(root) == depth], tensors, folder)


def copies(tensors: Iterable[Leaf], places: Iterable[OptimizerPlace]) -> frozenset[str]:
    """Keys at the root below which there are copies of the model, whose names stand at the
    root themselves: such as ``ema``, with averages under the same names. An optimizer has
    states for the model alone."""
    owners = _owners(places)
    names: set[str] = set()
    names_by_key: dict[str, set[str]] = {}
    for leaf in tensors:
        if len(leaf.keys) == 1:
            names.add(leaf.keys[0])
        else:
            names_by_key.setdefault(leaf.keys[0], set()).add(".".join(leaf.keys[1:]))

    return frozenset(
        key
        for key, below in names_by_key.items()
        if owners & below and below <= names and not any(f"{key}.{n}" in owners for n in below)
    )


def _holder(tensors: Sequence[Leaf], places: Sequence[OptimizerPlace], folder: Path) -> KeyPath:
    """The keys below which the parameters of the optimizer stand, where no key is a
    model's: none, if some stand at the root, or there is no optimizer."""
    holders = _holders(tensors, places)
    if not holders or () in holders:
        return ()
    return _only([*holders], tensors, folder)


def _roots(tensors: Iterable[Leaf]) -> list[KeyPath]:
    """The keys up to the first that is a model's, of all tensors, in their order."""
    roots: dict[KeyPath, None] = {}
    for leaf in tensors:
        for index, key in enumerate(leaf.keys[:-1]):
            if key in MODEL_KEYS:
                roots[leaf.keys[: index + 1]] = None
                break

    return [*roots]


def _beside_optimizer(
    roots: Sequence[KeyPath],
    parent: KeyPath,
    tensors: Sequence[Leaf],
    places: Sequence[OptimizerPlace],
    folder: Path,
) -> KeyPath:
    """The model under the same keys as the optimizer; or one below them, if it is the
    only one that has the parameters."""
    neighbors = [root for root in roots if root[:-1] == parent]
    if neighbors:
        return _only(neighbors, tensors, folder)

    holders = _holders(tensors, places)
    if not parent and () in holders:
        return ()
    models = [root for root in roots if root[: len(parent)] == parent]
    rivals = dict.fromkeys((*(models or roots), *holders))
    if len(rivals) > 1 or not models:
        raise CheckpointError(
            f"{folder} has an optimizer under {_name(places[0].base)}, and no model beside it; "
            f"its model may be {_listed(rivals)}; save the two under the same keys, as model and "
            "optimizer",
            "unsupported",
        )
    return models[0]


def _holders(tensors: Iterable[Leaf], places: Iterable[OptimizerPlace]) -> dict[KeyPath, None]:
    """The keys below which a parameter of the optimizer stands."""
    names = _owners(places)
    holders: dict[KeyPath, None] = {}
    for leaf in tensors:
        for index in range(len(leaf.keys)):
            if without_wrappers(".".join(leaf.keys[index:])) in names:
                holders[leaf.keys[:index]] = None

    return holders


def _owners(places: Iterable[OptimizerPlace]) -> set[str]:
    """The parameters that an optimizer has states of, without pieces of wrappers."""
    return {
        # flattened, a name has the key of the state behind it
        without_wrappers(owner if keys else owner.rpartition(".")[0])
        for _, _, (head, owner, *keys) in places
        if head == STATE
    }


def without_wrappers(name: str) -> str:
    """A name without the pieces that wrappers put in."""
    return ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)


def _only(roots: Sequence[KeyPath], tensors: Sequence[Leaf], folder: Path) -> KeyPath:
    """The root of the only model; of several under the same keys the first of
    ``MODEL_KEYS``, if no tensor has the same name in two of them."""
    names = [leaf.keys[len(root) :] for root in roots for leaf in tensors if _is_below(leaf, root)]
    if len({root[:-1] for root in roots}) > 1 or len(set(names)) < len(names):
        raise CheckpointError(
            f"{folder} has several models, {_listed(roots)}, expected one; save each into a "
            "folder of its own",
            "unsupported",
        )
    return min(roots, key=_rank)


def _rank(root: KeyPath) -> int:
    """The place of a root's last key among ``MODEL_KEYS``, or behind them."""
    return MODEL_KEYS.index(root[-1]) if root[-1] in MODEL_KEYS else len(MODEL_KEYS)


def _is_below(leaf: Leaf, root: KeyPath) -> bool:
    return leaf.keys[: len(root)] == root


def _name(keys: KeyPath) -> str:
    return ".".join(keys) or "the root"


def _listed(paths: Collection[KeyPath]) -> str:
    return ", ".join(sorted(map(_name, paths)))
