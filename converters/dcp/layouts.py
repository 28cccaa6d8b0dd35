"""Which leaves of a state dict are the model's, and which the optimizer's, by their keys.

    Trainer, Accelerate   model | NAME              optimizer | state | NAME | exp_avg
    torchtitan            NAME                      optimizer | state.NAME.exp_avg
    Lightning             model | NAME              optimizer_0 | state | NAME | exp_avg
    composer              state | model | NAME      state | optimizers | CLASS | state | NAME | ...
    torch's tutorials     app | model | NAME        app | optim | state | NAME | exp_avg

So a model's names follow a key such as ``model``, or stand at the root. An optimizer's states
follow keys such as ``optimizer`` and ``state``, by the names of parameters; flattened
(``flatten_optimizer_state_dict``), name and key of a state are one text.

Source: accelerate 1.15 ``utils/fsdp_utils.py``, torchtitan 0.3 ``components/checkpoint.py``,
Lightning 2.6 ``strategies/fsdp.py`` and ``model_parallel.py``, composer 0.32
``checkpoint/state_dict.py``, torch 2.13 ``distributed/checkpoint/state_dict.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from converters.dcp.entries.description import KeyPath
from converters.dcp.saved_state import Leaf
from converters.lazy_pattern import LazyPattern
from converters.names.rules import WRAPPERS

STATE, GROUPS = "state", "param_groups"
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module")
_OPTIMIZER = LazyPattern(r"optim(izer)?s?(_\d+|_states?(_dict)?)?")
# of a training, beside a model whose names stand at the root
_TRAINING_KEYS = {
    *("train_state", "trainer", "trainer_state", "loops", "callbacks", "extra", "extra_state"),
    *("dataloader", "data_loader", "sampler", "rng", "rng_state", "rng_states"),
    *("lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "scaler", "grad_scaler"),
}


class OptimizerLeaves(NamedTuple):
    """``states`` are leaves by the name of their parameter and their key, such as ``exp_avg``;
    ``groups`` those of hyperparameters, by the group's number, or flattened by a parameter."""

    states: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Mapping[str, str]]

    @property
    def are_named(self) -> bool:
        """Whether states stand by the names of parameters, and not by numbers."""
        return not all(name.isdecimal() for name in self.states) or not self.states


class StateLayout(NamedTuple):
    """``model`` are leaves by the names of the model's state dict, ``others`` tensors that are
    neither the model's nor the optimizer's, by their flat names."""

    model: Mapping[str, str]
    optimizer: OptimizerLeaves
    others: tuple[str, ...]


def split(leaves: Sequence[Leaf]) -> StateLayout:
    """The parts of a state dict of a training."""
    below_optimizer = {leaf.name: _optimizer_keys(leaf.keys) for leaf in leaves}
    tensors = [leaf for leaf in leaves if leaf.is_tensor and below_optimizer[leaf.name] is None]
    root = _model_root(tensors)
    of_model = {
        ".".join(leaf.keys[len(root) :]): leaf.name for leaf in tensors if _is_of(root, leaf.keys)
    }
    used = set(of_model.values())
    others = tuple(leaf.name for leaf in tensors if leaf.name not in used)

    optimizer_keys = {name: keys for name, keys in below_optimizer.items() if keys}
    return StateLayout(of_model, _optimizer_leaves(optimizer_keys, _ModelNames(of_model)), others)


def keys_of_names(names: Iterable[str]) -> dict[str, KeyPath]:
    """Keys for flat names, where no planner kept any: a first key that is an optimizer's or, of
    all other names, a model's is taken for one."""
    keys: dict[str, KeyPath] = {}
    for name in names:
        first, _, tail = name.partition(".")
        is_optimizer = bool(tail) and _OPTIMIZER.fullmatch(first) is not None
        keys[name] = (first, tail) if is_optimizer else (name,)

    model_names = [name for name, path in keys.items() if len(path) == 1]
    firsts = {name.partition(".")[0] for name in model_names}
    if len(firsts) == 1 and firsts <= set(_MODEL_KEYS) and all("." in n for n in model_names):
        keys |= {name: tuple(name.split(".", 1)) for name in model_names}
    return keys


def _optimizer_keys(keys: KeyPath) -> KeyPath | None:
    """The keys of an optimizer from ``state`` or ``param_groups`` on; an empty path for what
    else it has, ``None`` for what is not an optimizer's."""
    for index, key in enumerate(keys[:-1]):
        if _OPTIMIZER.fullmatch(key) is None:
            continue
        below = keys[index + 1 :]
        for depth, first in enumerate(below[:2]):  # one of several optimizers has a key more
            head, _, tail = first.partition(".")
            if head in (STATE, GROUPS):
                path = (head, tail, *below[depth + 1 :]) if tail else below[depth:]
                return path if len(path) > 1 else ()
        return ()

    return None


def _model_root(tensors: Sequence[Leaf]) -> KeyPath:
    """The keys that the model's names follow: none where these stand at the root."""
    roots: set[KeyPath] = set()
    for leaf in tensors:
        for index, key in enumerate(leaf.keys[:-1]):
            if key in _MODEL_KEYS:
                roots.add(leaf.keys[: index + 1])
                break

    def rank(root: KeyPath) -> tuple[int, int, KeyPath]:
        return len(root), _MODEL_KEYS.index(root[-1]), root

    return min(roots, key=rank, default=())


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
        counts = Counter(map(_without_wrappers, names))
        self.by_inner_name = {
            inner: name for name in names if counts[inner := _without_wrappers(name)] == 1
        }

    def get(self, name: str) -> str | None:
        """The model's own name; ``None`` if it has no such tensor."""
        if name in self.names:
            return name
        return self.by_inner_name.get(_without_wrappers(name))


def _without_wrappers(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)


def _optimizer_leaves(
    optimizer_keys: Mapping[str, KeyPath], model_names: _ModelNames
) -> OptimizerLeaves:
    states: dict[str, dict[str, str]] = {}
    groups: dict[str, dict[str, str]] = {}
    for leaf, keys in optimizer_keys.items():
        owner, key = keys[1], ".".join(keys[2:])
        if not key:
            owner, key = _of_flat_name(keys[1], model_names)
        part = states if keys[0] == STATE else groups
        part.setdefault(model_names.get(owner) or owner, {})[key] = leaf

    return OptimizerLeaves(states, groups)


def _of_flat_name(text: str, model_names: _ModelNames) -> tuple[str, str]:
    """Name and key of "NAME.KEY": the longest name that the model has, or all but the last."""
    name, _, key = text.rpartition(".")
    first_guess = (name, key)
    while name:
        if model_names.get(name) is not None:
            return name, key
        name, _, last = name.rpartition(".")
        key = f"{last}.{key}"

    return first_guess
