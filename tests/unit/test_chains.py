"""Tensors of tiles one after another, as ZeRO lays parameters down, against numpy."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import Files, values_of

from converters.execute import shards, small_files
from converters.storage.checksums import Ledger
from converters.tensors import DType, Extent, Listed, TensorRef, zeros
from converters.torch_files import file_plan, object_graph, reader
from converters.zero import partitioning
from converters.zero.native.proof import same_place


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_chain_has_the_values_that_numpy_joins_and_its_cuts_give_it_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    files = Files(tmp_path_factory.mktemp("chain"))
    arrays, refs = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
        whole = np.arange(rows * columns, dtype="<i2").reshape(rows, columns)
        arrays.append(whole.reshape(-1))
        if data.draw(st.booleans()):
            middle = data.draw(st.integers(1, columns - 1))
            left, right = files.store(whole[:, :middle]), files.store(whole[:, middle:], 2)
            refs.append(TensorRef.tile(whole.shape, [((0, 0), left), ((0, middle), right)]))
        else:
            refs.append(files.store(whole, data.draw(st.integers(1, 2))))

    chain, expected = TensorRef.concat(refs), np.concatenate(arrays)
    assert (values_of(chain) == expected).all()
    assert [chain.extents[index] for index in range(len(chain.extents))] == list(chain.extents)

    start = data.draw(st.integers(0, expected.size))
    count = data.draw(st.integers(0, expected.size - start))
    assert (values_of(chain.narrow(start, count)) == expected[start : start + count]).all()

    world_size = data.draw(st.integers(1, 4))
    partitions = partitioning.partition_group(refs, world_size) if expected.size else []
    rejoined = TensorRef.concat(partitions).narrow(0, expected.size)
    assert same_place(TensorRef.concat([rejoined]), chain)
    offset = 0
    for ref in refs:
        again = TensorRef.concat([rejoined.narrow(offset, ref.numel)])
        assert again.extents == TensorRef.concat([ref]).extents  # without going through runs
        offset += ref.numel


def test_places_of_other_tiles_are_not_the_same(tmp_path: Path) -> None:
    files = Files(tmp_path)
    first, second = (files.store(np.arange(6, dtype="<i2").reshape(3, 2)) for _ in range(2))
    tiled = TensorRef.tile((3, 4), [((0, 0), first), ((0, 2), second)])
    swapped = TensorRef.tile((3, 4), [((0, 0), second), ((0, 2), first)])
    assert same_place(TensorRef.concat([tiled]), TensorRef.concat([tiled]))
    assert not same_place(TensorRef.concat([tiled]), TensorRef.concat([swapped]))
    assert not same_place(TensorRef.concat([tiled]), TensorRef.concat([tiled]).narrow(0, 11))
    assert not same_place(None, TensorRef.concat([tiled]))


@pytest.mark.parametrize("execute", [shards.execute, small_files.execute])
def test_a_record_of_many_parts_has_the_crc32_of_all(execute: object, tmp_path: Path) -> None:
    """More runs than one placement has, and tiles among them."""
    files = Files(tmp_path)
    lone = np.arange(1200, dtype="<i2")
    runs = files.store(lone, 600)
    whole = np.arange(32, dtype="<i2").reshape(8, 4)
    halves = [((0, 0), files.store(whole[:, :2])), ((0, 2), files.store(whole[:, 2:]))]
    ref = TensorRef.concat([runs, TensorRef.tile(whole.shape, halves), runs.narrow(3, 400)])
    tensors = [object_graph.tensor(object_graph.storage(ref), (ref.numel,)) for _ in range(2)]
    shard = file_plan.shard("x.pt", {"first": tensors[0], "second": tensors[1]})
    plan = file_plan.Plan((shard,), None, 2 * ref.nbytes)

    assert len(shard.placements) > 2 * 3
    execute(plan, tmp_path / "out")  # type: ignore[operator]
    file = reader.read(tmp_path / "out/x.pt")
    checked_bytes, unchecked_bytes = Ledger().check(file.checksums)
    assert checked_bytes >= 2 * ref.nbytes and not unchecked_bytes
    expected = np.concatenate([lone, whole.reshape(-1), lone[3:403]])
    assert (values_of(file.root["second"]) == expected).all()


def test_a_large_model_is_cut_for_other_ranks_in_a_moment() -> None:
    """20 layers of a row-parallel weight of 8192 x 28672 on 8 ranks: 1.3 million runs."""
    shape, ranks = (8192, 28672), 8
    width = shape[1] // ranks

    def shard(rank: int, layer: int) -> TensorRef:
        nbytes = shape[0] * width * 4
        extents = Listed([Extent(Path(f"rank{rank}"), layer * nbytes, nbytes)])
        return TensorRef(DType.F32, (shape[0], width), extents)

    tracemalloc.start()
    begin = time.process_time()
    weights = [
        TensorRef.tile(shape, [((0, rank * width), shard(rank, layer)) for rank in range(ranks)])
        for layer in range(20)
    ]
    partitions = partitioning.partition_group([*weights, zeros(DType.F32, 77)], 16)
    again = TensorRef.concat(partitions)
    assert same_place(again.narrow(0, weights[0].numel), TensorRef.concat([weights[0]]))
    assert time.process_time() - begin < 2
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
