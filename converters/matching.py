"""Which unnamed fp32 tensor belongs to which 16-bit one, where only order, shape and value tell.

Each unnamed tensor has candidates: the places of the 16-bit tensors it may round to. Two rules
narrow them down: a place is taken once, and the members of a group come in the order of their
places, as ``named_parameters`` gives them. What is open after that has equal 16-bit values; it is
left open where that makes no difference to any fp32 value, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class AmbiguousError(Exception):
    """The tensor with the index ``args[0]`` has several candidates that make a difference."""


def assign(
    candidates: Sequence[set[int]],
    groups: Sequence[Sequence[int]],
    exact: Callable[[int], bool],
) -> dict[int, int]:
    """The place of each tensor by index; ``groups`` hold indices in order.

    ``exact`` says of a tensor whether its 16-bit value is all it holds; such ones may be left out.
    ``LookupError`` with the index of a tensor that fits nowhere, or ``AmbiguousError``.
    """
    left = [set(places) for places in candidates]
    while True:
        before = sum(map(len, left))
        _take_once(left)
        for group in groups:
            _keep_order(left, group)
        for index, places in enumerate(left):
            if not places:
                raise LookupError(index)
        if sum(map(len, left)) == before:
            break
    for index, places in enumerate(left):
        if len(places) > 1 and not exact(index):
            raise AmbiguousError(index)
    return {index: places.pop() for index, places in enumerate(left) if len(places) == 1}


def _take_once(left: list[set[int]]) -> None:
    owners = {next(iter(places)): index for index, places in enumerate(left) if len(places) == 1}
    for index, places in enumerate(left):
        left[index] = {place for place in places if owners.get(place, index) == index}


def _keep_order(left: list[set[int]], group: Sequence[int]) -> None:
    low = -1
    for index in group:
        left[index] = {place for place in left[index] if place > low}
        low = min(left[index], default=low)
    high: float = float("inf")
    for index in reversed(group):
        left[index] = {place for place in left[index] if place < high}
        high = max(left[index], default=high)
