"""Tensors of which ranks have boxes: where elements go, who gives them, and CRC32s of rows."""

from __future__ import annotations

import itertools
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ckpt.engine.splitting import whole
from ckpt.engine.splitting.part import ModelPart, PartBox, RankSet, whole_box
from ckpt.engine.splitting.placing import (
    PlacedBox,
    Placing,
    crc32_of_zeros,
    share_of_crc32,
)
from ckpt.engine.splitting.whole import GivenRun, Share, WholeTensor
from converters.errors import CheckpointError
from converters.tensors import DType

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
Boxed = tuple[tuple[int, ...], Boxes]
ROWS: Boxed = ((4, 6), [((0, 0), (4, 3)), ((0, 3), (4, 3))])  # row parallel
FUSED: Boxed = ((6, 2), [((0, 0), (1, 2)), ((1, 0), (1, 2)), ((2, 0), (2, 2)), ((4, 0), (2, 2))])
DEEP: Boxed = ((2, 3, 4), [((0, 0, 0), (2, 2, 2)), ((0, 0, 2), (2, 2, 2)), ((0, 2, 0), (2, 1, 4))])


def placing_of(shape: tuple[int, ...], boxes: Boxes) -> Placing:
    starts = itertools.accumulate((int(np.prod(sizes)) for _, sizes in boxes), initial=0)
    return Placing(
        shape, [PlacedBox(start, *box) for start, box in zip(starts, boxes, strict=False)]
    )


def box_of(array: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    index = tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))
    return array[index]


@pytest.mark.parametrize(("shape", "boxes"), [ROWS, FUSED, DEEP])
def test_any_run_of_elements_goes_where_they_belong(shape: tuple[int, ...], boxes: Boxes) -> None:
    tensor = np.arange(np.prod(shape)).reshape(shape)
    counted = np.concatenate([box_of(tensor, *box).ravel() for box in boxes])
    placing = placing_of(shape, boxes)
    for start, end in itertools.combinations(range(tensor.size + 1), 2):
        values = counted[start:end]
        placed = [
            (position + index, int(values[first + index]))
            for position, first, count in placing.runs(start, end - start)
            for index in range(count)
        ]
        assert len(placed) == end - start
        assert all(position == value for position, value in placed)


def test_elements_in_their_own_order_need_no_placing() -> None:
    assert placing_of(*FUSED).is_row_major
    assert not placing_of(*FUSED).is_scattered
    assert placing_of(*ROWS).is_scattered
    assert not placing_of(*ROWS).is_row_major


@pytest.mark.parametrize("size", [1, 2, 63, 64, 1000, 4097])
def test_crc32s_of_rows_of_several_ranks_make_that_of_the_record(size: int) -> None:
    record = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    assert crc32_of_zeros(size) == zlib.crc32(bytes(size))
    crc = crc32_of_zeros(size)
    for start in range(0, size, 37):  # in any order, and by anybody
        piece = record[start : start + 37]
        crc ^= share_of_crc32(zlib.crc32(piece), len(piece), size - start - len(piece))
    assert crc == zlib.crc32(record)


def row_part(rank: int, copies: RankSet, partitions: RankSet) -> ModelPart:
    """The right or left half of a (4, 6) tensor."""
    box = PartBox((0, 0), (4, 3), (0, 3 * rank))
    return ModelPart("w", DType.F32, (4, 6), (4, 3), (box,), copies, partitions)


def test_ranks_with_the_same_shard_give_slices_and_the_others_nothing() -> None:
    tensor = WholeTensor("w", DType.F32, placing_of(*ROWS), [(0, 0), (1, 1)], False, False)
    given: list[int] = []
    for rank, index in itertools.product((0, 1), (0, 1)):
        ranks = RankSet(rank, index, 2)
        for run in Share.of(row_part(rank, ranks, ranks), tensor).runs(0, 12, True):
            given += range(run.start, run.start + run.size)
    assert sorted(given) == list(range(24))

    replica = Share.of(row_part(0, RankSet(2, 0, 2), RankSet(2, 0, 2)), tensor)
    assert not [*replica.runs(0, 12, True), *replica.runs(0, 12, False)]


def test_a_partition_is_given_by_its_own_rank() -> None:
    tensor = WholeTensor("w", DType.F32, placing_of(*ROWS), [(0, 0), (1, 1)], False, False)
    ranks = RankSet(1, 1, 2)
    share = Share.of(row_part(1, ranks, ranks), tensor)
    assert list(share.runs(5, 7, False)) == [GivenRun(17, 0, 7)]


class OneRank(SimpleNamespace):
    """What ``agreed`` asks of a group of ranks, with the reports of all of them."""

    def __init__(self, reports: list[Any]) -> None:
        super().__init__(rank=0, reports=reports)

    def __enter__(self) -> Any:
        return SimpleNamespace(value=None, heard=self.reports)

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> OneRank:
        return self


def report_of(*parts: ModelPart) -> list[Any]:
    return [[part.record() for part in parts], []]


def test_parts_that_leave_a_hole_are_refused() -> None:
    alone = RankSet(0, 0, 1)
    with pytest.raises(CheckpointError, match=r"^w: the parts .* cover 12 elements of 24"):
        whole.agreed(OneRank([report_of(row_part(0, alone, alone))]), [], [])  # type: ignore[arg-type]


def test_ranks_with_other_models_are_refused() -> None:
    alone = RankSet(0, 0, 1)
    parts = [
        ModelPart("w", DType.F32, shape, shape, (whole_box(shape),), alone, alone)
        for shape in ((2, 2), (2, 3))
    ]
    reports = [report_of(part) for part in parts]
    with pytest.raises(CheckpointError, match=r"^rank 1: w is F32 of 2 x 3, expected F32 of 2 x 2"):
        whole.agreed(OneRank(reports), [], [])  # type: ignore[arg-type]
