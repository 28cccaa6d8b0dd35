"""Which saved param group each group of an optimizer is; where they differ, the first difference.

Groups that were saved by numbers are the same groups in the same order. Flattened ones
(``flatten_optimizer_state_dict``) have lost their borders: parameters of equal options
were one group or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt.engine.parameters import new_name
from ckpt.torch_training import leaves
from ckpt.torch_training.training import TorchTraining
from converters.dcp.optimizer_state import SavedOptimizer
from converters.errors import CheckpointError
from converters.words import counted


class GroupMatch(NamedTuple):
    """``names`` are those of parameters as saved, by id; ``indices`` those of the saved
    groups, ``None`` for a group without parameters of which nothing says which it is."""

    names: Mapping[int, str]
    indices: tuple[int | None, ...]


def match(
    folder: Path,
    saved: SavedOptimizer,
    training: TorchTraining,
    aliases: Mapping[int, Sequence[str]],
    renamed: Mapping[str, str],
) -> GroupMatch:
    """Finds the saved group of each; ``aliases`` are a parameter's names in the model, by id.

    ``CheckpointError`` names the first difference.
    """
    saved_groups = saved.groups()
    is_numbered = all(owner.isdecimal() for owner in saved.leaves.groups)
    places = {
        new_name(name, renamed): (index, name)
        for index, group in enumerate(saved_groups)
        for name in group.names
    }
    names: dict[int, str] = {}
    indices: list[int | None] = []
    for number, group_names in enumerate(leaves.group_names(training)):
        group = training.optimizer.param_groups[number]
        index = number if is_numbered else None
        for value, own_name in zip(group[leaves.PARAMS], group_names, strict=True):
            name = next((n for n in aliases.get(id(value), ()) if n in places), own_name)
            problem = _problem(places, name, number, index, is_numbered)
            if problem is not None:
                raise _other_groups(folder, problem)
            index, names[id(value)] = places[name]
        indices.append(index)

    lost = [name for name, (_, saved_name) in places.items() if saved_name not in names.values()]
    if lost:
        place = f"param group {places[lost[0]][0]}" if is_numbered else "a param group"
        problem = f"{lost[0]} was saved in {place}, and is in none of this optimizer"
        raise _other_groups(folder, problem)
    if is_numbered and len(indices) != len(saved_groups):
        numbers = counted(len(indices), "param group"), len(saved_groups)
        raise _other_groups(folder, "this optimizer has {}, and {} were saved".format(*numbers))
    return GroupMatch(names, tuple(indices))


def _problem(
    places: Mapping[str, tuple[int, str]],
    name: str,
    number: int,
    index: int | None,
    is_numbered: bool,
) -> str | None:
    """What differs for a parameter of group ``number``, which is the saved group ``index``."""
    place = f"{name} is in param group {number} of this optimizer, and was"
    if name not in places:
        return f"{place} in none at the save"
    saved_index = places[name][0]
    if index in (None, saved_index):
        return None
    if is_numbered:
        return f"{place} saved in param group {saved_index}"
    return f"{place} saved with other options"


def _other_groups(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {problem}; give the optimizer the same groups, or "
        "load_optimizer_states=False to begin with a new one",
        "refused",
    )
