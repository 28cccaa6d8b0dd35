"""A number that no ZeRO checkpoint can have is refused in words, whichever plan it is given to."""

from __future__ import annotations

from typing import Any

import pytest
from oracles import FIXTURES

import ckpt
from converters.errors import CheckpointError

SOURCE = FIXTURES / "zero2-bf16-w2"


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (0, {}, "world_size is 0; expected a number of ranks, 1 or more"),
        (True, {}, "world_size is True; expected a number of ranks, 1 or more"),
        (3, {"stage": 7}, "stage is 7; expected a ZeRO stage, 1, 2 or 3"),
        (3, {"stage": 0}, "stage is 0; expected a ZeRO stage, 1, 2 or 3"),
        (3, {"stage": 3, "sub_group_size": 0}, "sub_group_size is 0; expected a number of"),
    ],
)
def test_a_number_is_refused_before_anything_is_read(
    world_size: int, options: dict[str, Any], message: str
) -> None:
    for plan in (ckpt.reshard.plan, ckpt.universal.plan_from):
        with pytest.raises(CheckpointError, match=message) as raised:
            plan(SOURCE, world_size, **options)
        assert raised.value.kind == "refused"
