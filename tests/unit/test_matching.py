"""Matching without names, with literals."""

from __future__ import annotations

import pytest

from converters.zero.naming.name_matching import AmbiguousError, assign


def never(_: int) -> bool:
    return False


def test_a_place_is_taken_once() -> None:
    assert assign([{0, 1}, {0}], [[0], [1]], never) == {0: 1, 1: 0}


def test_members_of_a_group_come_in_order() -> None:
    assert assign([{1, 5, 9}] * 3, [[0, 1, 2]], never) == {0: 1, 1: 5, 2: 9}
    assert assign([{1, 5}, {3}, {1, 5}], [[0, 1, 2]], never) == {0: 1, 1: 3, 2: 5}


def test_neighbours_narrow_a_choice_down() -> None:
    candidates = [{0}, {1, 4}, {2}, {3}, {1, 4}, {5}]
    assert assign(candidates, [[0, 1, 2], [3, 4, 5]], never)[4] == 4


def test_an_open_choice_is_refused_unless_it_makes_no_difference() -> None:
    with pytest.raises(AmbiguousError, match="0"):
        assign([{0, 1}, {0, 1}], [[0], [1]], never)
    assert assign([{0, 1}, {0, 1}, {2}], [[0], [1], [2]], lambda _: True) == {2: 2}


def test_a_tensor_that_fits_nowhere_is_named() -> None:
    with pytest.raises(LookupError, match="1"):
        assign([{0}, set()], [[0, 1]], never)
    with pytest.raises(LookupError):
        assign([{1}, {0}], [[0, 1]], never)


def test_many_alike_take_no_time() -> None:
    alike = [set(range(500))] * 500
    assert assign(alike, [[index] for index in range(500)], lambda _: True) == {}
    assert assign(alike, [range(500)], never) == {index: index for index in range(500)}
