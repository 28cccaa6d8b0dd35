"""Whose the numbered states of a pipeline are, by the order and the shapes of its layers."""

from __future__ import annotations

from converters.zero.pipeline.layer_order import Shape, ways

EMBED: list[Shape] = [(9, 4), (5, 4)]
BLOCK: list[Shape] = [(4,), (4, 4)]
WIDE: list[Shape] = [(4,), (8, 4)]
NORM: list[Shape] = [(4,)]


def test_layers_of_unlike_shapes_can_be_dealt_out_in_one_way() -> None:
    layers = {0: EMBED, 1: BLOCK, 3: WIDE, 4: NORM}
    stages = [[*EMBED, *BLOCK], [*WIDE, *NORM]]
    assert ways(stages, layers) == {((0, 1), (3, 4))}


def test_a_tied_module_stands_first_in_each_of_its_stages() -> None:
    layers = {0: EMBED, 1: BLOCK, 3: WIDE, 4: NORM}
    stages = [[*EMBED, *BLOCK], [*EMBED, *WIDE, *NORM]]
    assert ways(stages, layers) == {((0, 1), (0, 3, 4))}


def test_layers_that_are_alike_leave_a_choice_if_one_of_them_may_be_tied() -> None:
    layers = {1: BLOCK, 2: BLOCK}
    found = ways([[*BLOCK, *BLOCK]], layers)
    assert found is not None and len(found) > 1


def test_no_way_is_left_where_a_layer_is_missing() -> None:
    layers = {0: EMBED, 1: BLOCK, 2: BLOCK, 4: BLOCK}
    stages = [[*EMBED, *BLOCK, *BLOCK], [*EMBED, *BLOCK, *BLOCK]]
    assert ways(stages, layers) == set()


def test_layers_without_parameters_are_in_no_stage() -> None:
    layers: dict[int, list[Shape]] = {0: EMBED, 1: [], 2: BLOCK}
    assert ways([EMBED, BLOCK], layers) == {((0,), (2,))}


def test_what_would_take_too_long_is_not_tried() -> None:
    layers = dict.fromkeys(range(3000), BLOCK)
    assert ways([BLOCK * 3000], layers) is None
