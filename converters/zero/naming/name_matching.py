"""Which unnamed fp32 tensor belongs to which 16-bit one, where only order, shape
and value tell.

Each unnamed tensor has candidates: the places of the 16-bit tensors it may round to.
Two rules narrow them down: a place is taken once, and the members of a group come in
the order of their places, as ``named_parameters`` gives them. What is open after that
has equal 16-bit values; it is left open where that makes no difference to any fp32
value, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class NoPlaceError(LookupError):
    """The tensor with the index ``args[0]`` fits nowhere."""


class AmbiguousError(Exception):
    """The tensor with the index ``args[0]`` has several candidates that differ."""


def assign(
    candidates: Sequence[set[int]],
    groups: Sequence[Sequence[int]],
    exact: Callable[[int], bool],
) -> dict[int, int]:
    """The place of each tensor by index; ``groups`` hold indices in order.

    ``exact`` says of a tensor whether its 16-bit value is all it holds; such ones may
    be left out. ``NoPlaceError`` with the index of a tensor that fits nowhere, or
    ``AmbiguousError``.
    """
    remaining = [set(positions) for positions in candidates]
    while True:
        count_before = sum(map(len, remaining))
        _take_once(remaining)
        for group in groups:
            _keep_order(remaining, group)
        for index, positions in enumerate(remaining):
            if not positions:
                raise NoPlaceError(index)

        if sum(map(len, remaining)) == count_before:
            break

    for index, positions in enumerate(remaining):
        if len(positions) > 1 and not exact(index):
            raise AmbiguousError(index)

    return {
        index: positions.pop() for index, positions in enumerate(remaining) if len(positions) == 1
    }


def _take_once(remaining: list[set[int]]) -> None:
    owners = {
        next(iter(positions)): index
        for index, positions in enumerate(remaining)
        if len(positions) == 1
    }

    for index, positions in enumerate(remaining):
        remaining[index] = {
            position for position in positions if owners.get(position, index) == index
        }


def _keep_order(remaining: list[set[int]], group: Sequence[int]) -> None:
    lowest = -1  # the least position that the member before can have
    for index in group:
        positions = {position for position in remaining[index] if position > lowest}
        remaining[index] = positions
        lowest = min(positions, default=lowest)

    highest: float = float("inf")  # the greatest that the member behind can have
    for index in reversed(group):
        positions = {position for position in remaining[index] if position < highest}
        remaining[index] = positions
        highest = max(positions, default=highest)
