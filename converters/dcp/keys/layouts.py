"""Which leaves of a state dict are the model's,
and which the optimizer's, by their keys.

    Trainer, Accelerate   model | NAME              optimizer | state | NAME | exp_avg
    torchtitan            NAME                      optimizer | state.NAME.exp_avg
    Lightning             model | NAME              optimizer_0 | state | NAME | exp_avg
    composer              state | model | NAME      state | optimizers | CLASS | state | NAME | ...
    torch's tutorials     app | model | NAME        app | optim | state | NAME | exp_avg
    scripts               net | NAME                opt_g | state | NAME | exp_avg

So a model's names follow a key such as ``model``, or stand at the root. An optimizer's
states follow keys such as ``optimizer`` and ``state``, by the names of parameters;
flattened (``flatten_optimizer_state_dict``), name and key of a state are one text. What
has ``param_groups`` is an optimizer under any key.

Source: accelerate 1.15 ``utils/fsdp_utils.py``, torchtitan 0.3
``components/checkpoint.py``, Lightning 2.6 ``strategies/fsdp.py`` and
``model_parallel.py``, composer 0.32 ``checkpoint/state_dict.py``, torch 2.13
``distributed/checkpoint/state_dict.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from converters.dcp.keys import model_roots
from converters.dcp.keys.leaves import KeyPath, Leaf
from converters.dcp.keys.model_roots import MODEL_KEYS, OptimizerPlace, without_wrappers
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern

STATE, GROUPS = model_roots.STATE, model_roots.GROUPS
_OPTIMIZER = LazyPattern(r"optim(izer)?s?(_\d+|_states?(_dict)?)?")
_STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master_param"}
# of a training, beside a model whose names stand at the root
_TRAINING_KEYS = {
    *("train_state", "trainer", "trainer_state", "loops", "callbacks", "extra", "extra_state"),
    *("dataloader", "data_loader", "sampler", "rng", "rng_state", "rng_states"),
    *("lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "scaler", "grad_scaler"),
}


class OptimizerLeaves(NamedTuple):
    """``states`` are leaves by the name of their parameter and their key, such as
    ``exp_avg``; ``groups`` those of hyperparameters, by the group's number, or flattened
    by a parameter."""

    states: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Mapping[str, str]]
    optimizers: tuple[str, ...] = ()  # what the state dict calls each of them

    @property
    def are_named(self) -> bool:
        """Whether states stand by the names of parameters, and not by numbers."""
        return not all(name.isdecimal() for name in self.states) or not self.states


class StateLayout(NamedTuple):
    """``model`` are leaves by the names of the model's state dict, ``others`` tensors
    that are neither the model's nor the optimizer's, by their flat names."""

    model: Mapping[str, str]
    optimizer: OptimizerLeaves
    others: tuple[str, ...]


def split(leaves: Sequence[Leaf], folder: Path) -> StateLayout:
    """The parts of a state dict of a training, which lies in ``folder``.

    ``CheckpointError`` where several models or trainings could be meant.
    """
    bases = _bases(leaves)
    places = {leaf.name: _optimizer_place(leaf.keys, bases) for leaf in leaves}
    tensors = [leaf for leaf in leaves if leaf.is_tensor and places[leaf.name] is None]
    optimizer_places = {name: place for name, place in places.items() if place and place.below}

    root = model_roots.choose(tensors, [*optimizer_places.values()], folder)
    copies = () if root else model_roots.copies(tensors, optimizer_places.values())
    of_model = {
        ".".join(leaf.keys[len(root) :]): leaf.name
        for leaf in tensors
        if _is_of(root, leaf.keys) and leaf.keys[0] not in copies
    }
    used = set(of_model.values())
    others = tuple(leaf.name for leaf in tensors if leaf.name not in used)
    return StateLayout(
        of_model, _optimizer_leaves(optimizer_places, _ModelNames(of_model), folder), others
    )


def keys_of_names(names: Iterable[str]) -> dict[str, KeyPath]:
    """Keys for flat names, where no planner kept any: a first key that is an optimizer's
    or, of all other names, a model's is taken for one."""
    keys: dict[str, KeyPath] = {}
    for name in names:
        first, _, tail = name.partition(".")
        is_optimizer = bool(tail) and _OPTIMIZER.fullmatch(first) is not None
        keys[name] = (first, tail) if is_optimizer else (name,)

    model_names = [name for name, path in keys.items() if len(path) == 1]
    firsts = {name.partition(".")[0] for name in model_names}
    if len(firsts) == 1 and firsts <= set(MODEL_KEYS) and all("." in n for n in model_names):
        keys |= {name: tuple(name.split(".", 1)) for name in model_names}
    return keys


def _bases(leaves: Sequence[Leaf]) -> frozenset[KeyPath]:
    """The keys of optimizers that ``param_groups`` tell, none of the root itself.

    Where all has the form of an optimizer's states, the root is one without groups.
    """
    bases = {
        leaf.keys[:depth]
        for leaf in leaves
        for depth, key in enumerate(leaf.keys)
        if key.partition(".")[0] == GROUPS
    }
    heads = {leaf.keys[0].partition(".")[0] for leaf in leaves}
    last_keys = {leaf.name.rpartition(".")[2] for leaf in leaves if leaf.is_tensor}
    if heads == {STATE} and last_keys and last_keys <= _STATE_KEYS:
        bases.add(())
    return frozenset(bases)


def _optimizer_place(keys: KeyPath, bases: frozenset[KeyPath]) -> OptimizerPlace | None:
    """Where a leaf stands in an optimizer; ``None`` for what is not an optimizer's.

    ``bases`` are keys of optimizers, whatever their names.
    """
    for index, key in enumerate(keys[:-1]):
        if keys[: index + 1] not in bases and _OPTIMIZER.fullmatch(key) is None:
            continue
        below = keys[index + 1 :]
        for depth in range(len(below[:2])):  # one of several optimizers has a key more
            path = _state_path(below[depth:])
            if path is not None:
                return OptimizerPlace(keys[:index], keys[: index + 1 + depth], path)
        return OptimizerPlace(keys[:index], keys[: index + 1], ())

    path = _state_path(keys) if () in bases else None
    return None if path is None else OptimizerPlace((), (), path)


def _state_path(keys: KeyPath) -> KeyPath | None:
    """Keys from ``state`` or ``param_groups`` on, the first of them apart; empty where
    there is but one, ``None`` where they begin with another."""
    head, _, tail = keys[0].partition(".")
    if head not in (STATE, GROUPS):
        return None
    path = (head, tail, *keys[1:]) if tail else keys
    return path if len(path) > 1 else ()


def _is_of(root: KeyPath, keys: KeyPath) -> bool:
    """Whether a leaf is the model's."""
    if root:
        return keys[: len(root)] == root
    return len(keys) == 1 or keys[0] not in _TRAINING_KEYS


class _ModelNames:
    """The names of a model's tensors, looked up by what the optimizer calls them.

    It may have the pieces that wrappers put into a name, where the state dict has none.
    """

    def __init__(self, names: Collection[str]):
        self.names = names
        counts = Counter(map(without_wrappers, names))
        self.by_inner_name = {
            inner: name for name in names if counts[inner := without_wrappers(name)] == 1
        }

    def get(self, name: str) -> str | None:
        """The model's own name; ``None`` if it has no such tensor."""
        if name in self.names:
            return name
        return self.by_inner_name.get(without_wrappers(name))


def _optimizer_leaves(
    places: Mapping[str, OptimizerPlace], model_names: _ModelNames, folder: Path
) -> OptimizerLeaves:
    """The leaves of the optimizer, or of all: several are one, with the groups of each."""
    states: dict[str, dict[str, str]] = {}
    groups: dict[str, dict[str, str]] = {}
    bases = dict.fromkeys(place.base for place in places.values())
    base_of_state: dict[str, KeyPath] = {}
    numbers = _group_numbers(places.values()) if len(bases) > 1 else {}
    for leaf, (_, base, keys) in places.items():
        owner, key = keys[1], ".".join(keys[2:])
        if not key:
            owner, key = _of_flat_name(keys[1], model_names)
        if keys[0] == GROUPS:
            owner = numbers.get((base, owner), owner)
            groups.setdefault(model_names.get(owner) or owner, {})[key] = leaf
            continue

        name = model_names.get(owner) or owner
        first_base = base_of_state.setdefault(name, base)
        if first_base != base and not name.isdecimal():
            raise CheckpointError(
                f"{folder} has states of {name} in two optimizers, {'.'.join(first_base)} and "
                f"{'.'.join(base)}, expected one; save the model with the optimizer that trains "
                "it, without the other",
                "unsupported",
            )
        states.setdefault(name, {})[key] = leaf

    return OptimizerLeaves(states, groups, tuple(".".join(base) for base in bases))


def _group_numbers(places: Iterable[OptimizerPlace]) -> dict[tuple[KeyPath, str], str]:
    """Numbers for the groups of several optimizers,
    in their order, by optimizer and number."""
    numbers_by_base: dict[KeyPath, set[int]] = {}
    for place in places:
        if place.below[0] == GROUPS and place.below[1].isdecimal():
            numbers_by_base.setdefault(place.base, set()).add(int(place.below[1]))

    ordered = [(base, n) for base, numbers in numbers_by_base.items() for n in sorted(numbers)]
    return {(base, str(n)): str(index) for index, (base, n) in enumerate(ordered)}


def _of_flat_name(text: str, model_names: _ModelNames) -> tuple[str, str]:
    """Name and key of "NAME.KEY": the longest name that the model has,
    or all but the last."""
    name, _, key = text.rpartition(".")
    first_guess = (name, key)
    while name:
        if model_names.get(name) is not None:
            return name, key
        name, _, last = name.rpartition(".")
        key = f"{last}.{key}"

    return first_guess
