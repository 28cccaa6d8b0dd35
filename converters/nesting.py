"""How deep the values of a pickle lie in each other, and how many they are, each written out.

A pickle names a value again instead of repeating it. So a few bytes can describe more than any
program could walk through: a list of twice a list of twice a list, or a list in itself. To read it
does no harm; to show, compare or copy it does. No training's state is like that: Python's pickler
ends in its own recursion long before ``MOST_DEEP``.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from converters.records import Record
from converters.tensors import TensorRef

MOST_DEEP = 10_000  # values in each other; Python's pickler gives up at about 1,000
MOST_UNFOLDED = 1 << 32  # values, each counted as often as it is named
_CONTAINERS = (dict, list, tuple, set, frozenset)
_BRANCHES = (*_CONTAINERS, Record, TensorRef)
_SMALL = 8  # values; a container of no more, and none inside, is not worth a note
_OPEN = 0  # in place of the size of what is being looked at


def wrong(root: Any) -> str | None:
    """What makes ``root`` no value of a training; ``None`` if it is a value like any other.

    What an object is given after its making (``state``, ``items``, ``pairs``, a tensor's
    attributes) may lead back to it, as in many programs: each is looked at for itself.
    """
    sizes: dict[int, int] = {}  # by identity
    roots = [root]
    while roots:
        top = [roots.pop()]  # as if in a list of its own
        path: list[tuple[Any, list[Any]]] = [(top, top)]
        totals = [0]
        while path:
            value, inside = path[-1]
            if not inside:
                path.pop()
                total = sizes[id(value)] = totals.pop()
                if total > MOST_UNFOLDED:
                    return f"over {MOST_UNFOLDED} values, each counted as often as it is named"
                if totals:
                    totals[-1] += total
                continue
            branch = inside.pop()
            known = sizes.get(id(branch))
            if known == _OPEN:
                return "a value that lies in itself"
            if known is not None:
                totals[-1] += known
                continue
            branches, size = _inside(branch, roots)
            if not branches and size <= _SMALL:
                totals[-1] += size
                continue
            sizes[id(branch)] = _OPEN
            path.append((branch, branches))
            totals.append(size)
            if len(path) > MOST_DEEP:
                return f"values nested more than {MOST_DEEP} deep"
    return None


def _inside(value: Any, roots: list[Any]) -> tuple[list[Any], int]:
    """What lies in a value and may hold others, and how many values it is without these.

    What it got after its making is added to ``roots``.
    """
    if isinstance(value, Record):
        pairs = chain.from_iterable(value.pairs or ())
        roots.extend(_branches((value.state, *(value.items or ()), *pairs)))
        return _branches((value.of, *value.args)), 1 + len(value.args)
    if isinstance(value, TensorRef):
        if value.attributes:
            roots.append(value.attributes)
        return [], 1
    if isinstance(value, dict):
        return _branches(chain(value, value.values())), 1 + len(value)
    return (_branches(value), 1 + len(value)) if isinstance(value, _CONTAINERS) else ([], 1)


def _branches(values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, _BRANCHES)]
