"""A number that no ZeRO checkpoint can have is refused in words, whichever plan it is given to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracles import FIXTURES, run

import ckpt
from converters.errors import CheckpointError

SOURCE = FIXTURES / "zero2-bf16-w2"


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (0, {}, "world_size is 0; expected a number of ranks, 1 or more"),
        (True, {}, "world_size is True; expected a number of ranks, 1 or more"),
        (3, {"stage": 7}, "stage is 7; expected a ZeRO stage, 1, 2 or 3"),
        (3, {"stage": -1}, "stage is -1; expected a ZeRO stage, 1, 2 or 3"),
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


def test_without_a_number_of_ranks_it_is_said_how_many_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    universal = tmp_path / "universal"
    run("to-universal", SOURCE, "-o", universal)
    capsys.readouterr()
    run("from-universal", universal, code=1)
    assert capsys.readouterr().err == (
        f"ckpt: {universal} fits any number of ranks, and native files fit one number: say with "
        "--world-size RANKS how many ranks (GPUs) will resume; 2 ranks saved it, with ZeRO stage 2"
        "\n"
    )
    with pytest.raises(CheckpointError, match="say with world_size=RANKS how many") as raised:
        ckpt.universal.plan_from(universal)
    assert raised.value.kind == "refused"
