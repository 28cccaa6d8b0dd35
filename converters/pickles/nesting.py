"""How deep the values of a pickle lie in each other,
and how many they are, each written out.

A pickle names a value again instead of repeating it. So a few bytes can describe more
than any program could walk through: a list of twice a list of twice a list, or a list in
itself. To read it does no harm; to show, compare or copy it does. No training's state is
like that: Python's pickler ends in its own recursion long before ``MAX_DEPTH``.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from converters.pickles.values import Call
from converters.tensors import TensorRef

MAX_DEPTH = 10_000  # values in each other; Python's pickler gives up at about 1,000
MAX_UNFOLDED_VALUES = 1 << 32  # values, each counted as often as it is named
_CONTAINERS = (dict, list, tuple, set, frozenset)
_BRANCHES = (*_CONTAINERS, Call, TensorRef)
IN_ITSELF = "a dict, list or tuple that lies in itself"  # Python and torch have no trouble with it
_SMALL = 8  # values; a container of no more, and none inside, is not worth a note
_OPEN = 0  # in place of the size of what is being looked at


def wrong(root: Any) -> str | None:
    """The reason why ``root`` is no value of a training;
    ``None`` if it is a value like any other.

    What an object is given after its making (``state``, ``items``, ``pairs``, a tensor's
    attributes) may lead back to it, as in many programs: each is looked at for itself.
    """
    sizes: dict[int, int] = {}  # by identity
    roots = [root]
    while roots:
        wrapper = [roots.pop()]  # as if in a list of its own
        open_branches: list[tuple[Any, list[Any]]] = [(wrapper, wrapper)]
        totals = [0]
        while open_branches:
            value, remaining = open_branches[-1]
            if not remaining:
                open_branches.pop()
                total = sizes[id(value)] = totals.pop()
                if total > MAX_UNFOLDED_VALUES:
                    return (
                        f"over {MAX_UNFOLDED_VALUES} values, each counted as often as it is named"
                    )
                if totals:
                    totals[-1] += total
                continue

            branch = remaining.pop()
            known_size = sizes.get(id(branch))
            if known_size == _OPEN:
                return IN_ITSELF
            if known_size is not None:
                totals[-1] += known_size
                continue

            branches, size = _contents(branch, roots)
            if not branches and size <= _SMALL:
                totals[-1] += size
                continue

            sizes[id(branch)] = _OPEN
            open_branches.append((branch, branches))
            totals.append(size)
            if len(open_branches) > MAX_DEPTH:
                return f"values nested more than {MAX_DEPTH} deep"

    return None


def _contents(value: Any, roots: list[Any]) -> tuple[list[Any], int]:
    """What lies in a value and may hold others, and how many values it is without these.

    What it got after its making is added to ``roots``.
    """
    if isinstance(value, Call):
        pairs = chain.from_iterable(value.pairs or ())
        roots.extend(_branches((value.state, *(value.items or ()), *pairs)))
        return _branches((value.of, *value.args)), 1 + len(value.args)
    if isinstance(value, TensorRef):
        if value.attributes:
            roots.append(value.attributes)
        return [], 1
    if isinstance(value, dict):
        return _branches(chain(value, value.values())), 1 + len(value)

    if isinstance(value, _CONTAINERS):
        return _branches(value), 1 + len(value)
    return [], 1


def _branches(values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, _BRANCHES)]
