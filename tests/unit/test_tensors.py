"""The waist and the layout, with literals and without files."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.tensors import DType, Extent, TensorRef, Weights
from converters.zero import partitioning

A, B = Path("a"), Path("b")


def f32(path: Path, offset: int, numel: int) -> TensorRef:
    return TensorRef(DType.F32, (numel,), (Extent(path, offset, 4 * numel),))


def test_a_tensor_that_its_extents_do_not_hold_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="needs 24 bytes, its extents hold 20"):
        TensorRef(DType.F32, (2, 3), (Extent(A, 0, 20),))
    with pytest.raises(ValueError, match="no 4 bytes at -1"):
        Extent(A, -1, 4)


def test_narrow_takes_the_runs_it_needs_and_no_more() -> None:
    ref = TensorRef(DType.F32, (5,), (Extent(A, 100, 8), Extent(B, 40, 12)))
    assert ref.narrow(1, 3).extents == (Extent(A, 104, 4), Extent(B, 40, 8))
    assert ref.narrow(2, 0).extents == ()
    with pytest.raises(ValueError, match="elements 3 to 6 of 5"):
        ref.narrow(3, 3)


def test_runs_that_touch_become_one() -> None:
    joined = TensorRef.concat([f32(A, 0, 2), f32(A, 8, 3), f32(B, 20, 1)])
    assert joined.extents == (Extent(A, 0, 20), Extent(B, 20, 4))


def test_types_are_never_joined_silently() -> None:
    half = TensorRef(DType.BF16, (1,), (Extent(A, 0, 2),))
    with pytest.raises(ValueError, match="BF16"):
        TensorRef.concat([f32(A, 0, 1), half])


def test_a_tied_name_must_have_an_owner() -> None:
    with pytest.raises(ValueError, match="head is tied to embed"):
        Weights({}, {"head": "embed"})
    with pytest.raises(ValueError, match="both present and absent"):
        Weights({"a": f32(A, 0, 1)}, absent={"a": "why"})


def test_a_parameter_may_span_two_ranks() -> None:
    ranks = [f32(Path(f"r{r}"), 64, 6) for r in (0, 1)]
    tensors = dict(partitioning.stage12(ranks, {"a": (4,), "b": (2, 2)}))
    assert tensors["b"].extents == (Extent(Path("r0"), 80, 8), Extent(Path("r1"), 64, 8))
    assert partitioning.unused_elements(ranks, {"a": (4,), "b": (2, 2)}) == 4


def test_alignment_stands_between_parameters() -> None:
    tensors = dict(partitioning.stage12([f32(A, 0, 11)], {"a": (3,), "b": (3,)}, (5, 0)))
    assert tensors["b"].extents == (Extent(A, 32, 12),)
    assert partitioning.unused_elements([f32(A, 0, 11)], {"a": (3,), "b": (3,)}, (5, 0)) == 0


def test_stage_3_pads_every_parameter_on_the_last_ranks() -> None:
    ranks = [f32(Path(f"r{r}"), 0, 3) for r in (0, 1)]
    tensors = dict(partitioning.stage3(ranks, {"a": (3,), "b": ()}))
    assert tuple(tensors["a"].extents) == (Extent(Path("r0"), 0, 8), Extent(Path("r1"), 0, 4))
    assert tensors["b"].extents == (Extent(Path("r0"), 8, 4),)
    assert tensors["b"].shape == ()
    assert partitioning.subgroup_size({"a": (3,), "b": ()}, 2) == 3


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


def gather(ref: TensorRef, ranks: list[np.ndarray]) -> np.ndarray:
    parts = [
        ranks[int(e.path.name)][e.offset // 4 : (e.offset + e.length) // 4] for e in ref.extents
    ]
    return np.concatenate([np.empty(0, np.float32), *parts]).reshape(ref.shape)


@given(SHAPES, st.integers(1, 5))
def test_any_stage_12_partitioning_is_undone(shapes: list[tuple[int, ...]], world: int) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    total = sum(map(prod, shapes))
    flat = np.arange(total, dtype=np.float32)
    run = -(-total // world)
    ranks = [flat[r * run : (r + 1) * run] for r in range(world)]  # lean: the last are short
    refs = [f32(Path(str(r)), 0, len(data)) for r, data in enumerate(ranks)]
    at = 0
    for name, ref in partitioning.stage12(refs, named):
        size = prod(named[name])
        assert np.array_equal(gather(ref, ranks).ravel(), flat[at : at + size])
        assert ref.shape == named[name]
        at += size


@given(SHAPES, st.integers(1, 5))
def test_any_stage_3_partitioning_is_undone(shapes: list[tuple[int, ...]], world: int) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    ranks: list[list[np.ndarray]] = [[] for _ in range(world)]
    values = {}
    for name, shape in named.items():
        values[name] = np.random.default_rng(len(values)).random(prod(shape), np.float32)
        run = partitioning.partition_numel(shape, world)
        padded = np.full(run * world, np.nan, np.float32)
        padded[: prod(shape)] = values[name]
        for r in range(world):
            ranks[r].append(padded[r * run : (r + 1) * run])
    flats = [np.concatenate(parts) for parts in ranks]
    assert len(flats[0]) == partitioning.subgroup_size(named, world)
    refs = [f32(Path(str(r)), 0, len(flat)) for r, flat in enumerate(flats)]
    for name, ref in partitioning.stage3(refs, named):
        assert np.array_equal(gather(ref, flats).ravel(), values[name])
