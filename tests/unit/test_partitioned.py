"""Runs that are worked out (partitioned tensors, a rank's cuts) are those that lists have, and
planning grows no faster than what it plans."""

import random
from pathlib import Path

import pytest

from converters.extents import ZEROS, Extent, Listed, joined_runs
from converters.pickles.values import Call, Global
from converters.rank_cuts import RankPart
from converters.tensors import DType, TensorRef, zeros
from converters.torch_files import object_graph, pickle_writer
from converters.zero import partitioning


def vectors(ranks, numel):
    """A vector of each rank, in a file of its own."""
    return [
        TensorRef(DType.F32, (numel,), Listed([Extent(Path(f"rank{rank}"), 64, 4 * numel)]))
        for rank in range(ranks)
    ]


def listed(tensor):
    """Its runs; of padding any place is as good."""
    runs = joined_runs(tensor.extents)
    return tuple(Extent(ZEROS, 0, run.length) if run.path == ZEROS else run for run in runs)


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_parameters_of_stage_3_are_the_ranks_pieces_one_after_another(ranks):
    shapes = {"matrix": (7, 5), "scalar": (), "empty": (0, 3), "short": (3,), "vector": (64,)}
    rank_vectors = vectors(ranks, partitioning.subgroup_size(shapes, ranks))
    draw = random.Random(ranks)
    offset = 0
    for name, tensor in partitioning.stage3(rank_vectors, shapes):
        size = partitioning.partition_numel(shapes[name], ranks)
        pieces = [vector.narrow(offset, size) for vector in rank_vectors]
        whole = TensorRef.concat(pieces).narrow(0, tensor.numel) if size else None
        assert listed(tensor) == (listed(whole) if whole else ())
        assert tensor.extents.nbytes == tensor.nbytes
        for _ in range(8):
            start = draw.randint(0, tensor.numel)
            length = draw.randint(0, tensor.numel - start)
            part, expected = tensor.narrow(start, length), ()
            if length:
                expected = listed(whole.narrow(start, length))
            assert listed(part) == expected
        offset += size


@pytest.mark.parametrize("world_size", [1, 3, 7, 40])
def test_what_a_rank_has_of_parameters_are_its_pieces_and_zeros(world_size):
    shapes = {"a": (11, 3), "b": (2,), "c": (), "d": (50,)}
    source = vectors(4, partitioning.subgroup_size(shapes, 4))
    parameters = [tensor for _, tensor in partitioning.stage3(source, shapes)]
    draw = random.Random(world_size)
    parts = partitioning.partition_parameters(parameters, world_size)
    assert len(parts) == world_size
    for rank, part in enumerate(parts):
        assert isinstance(part.extents, RankPart)
        pieces = (partitioning.partition_parameter(ref, rank, world_size) for ref in parameters)
        expected = partitioning.joined(pieces)
        assert listed(part) == listed(expected)
        assert part.shape == expected.shape
        for _ in range(8):
            start = draw.randint(0, part.numel)
            length = draw.randint(0, part.numel - start)
            assert listed(part.narrow(start, length)) == listed(expected.narrow(start, length))


def test_parts_of_several_types_are_refused_and_empty_ones_are_empty():
    empty = partitioning.partition_parameters([zeros(DType.F32, 0)], 3)
    assert [part.numel for part in empty] == [0, 0, 0]
    with pytest.raises(Exception, match="types"):
        partitioning.partition_parameters([zeros(DType.F32, 4), zeros(DType.BF16, 4)], 2)


def tree(path, shared=None, lr=0.5):
    storage = object_graph.storage(TensorRef(DType.F32, (2,), Listed([Extent(path, 0, 8)])))
    tensor = object_graph.tensor(storage, (2,))
    again = tensor if shared is None else object_graph.tensor(storage, (2,))
    return {"a": tensor, "b": [again, {"lr": lr}], "c": Call(Global("torch", "Size"), ((2,),))}


@pytest.mark.parametrize(
    ("second", "is_same"),
    [
        (tree(Path("b")), True),
        (tree(Path("b"), lr=0.25), False),
        (tree(Path("b"), shared=False), False),
        ({**tree(Path("b")), "d": 1}, False),
        ({**tree(Path("b")), "b": [1, 2, 3]}, False),
    ],
)
def test_pickles_are_used_again_where_nothing_but_storages_differs(second, is_same):
    pickles = pickle_writer.Pickles()
    first_data, _ = pickles.dumps(tree(Path("a")))
    data, storages = pickles.dumps(second)
    expected_data, expected_storages = pickle_writer.dumps(second)
    assert (data, storages) == (expected_data, expected_storages)
    assert (data is first_data) == is_same


def test_an_empty_storage_that_becomes_another_is_pickled_anew():
    """It may lie in what is the same for all files, which is not looked at again."""
    empty = [object_graph.storage(TensorRef(DType.F32, (0,), Listed())) for _ in range(2)]
    shared = [object_graph.tensor(empty[0], (0,))]
    pickles = pickle_writer.Pickles()
    pickles.dumps({"shared": shared, "own": empty[0]})
    second = {"shared": shared, "own": empty[1]}
    assert pickles.dumps(second) == pickle_writer.dumps(second)


def steps_of_planning(ranks, target):
    """Runs that are looked at while a plan is made and one vector of it is moved."""
    shapes = {f"layer{index}": (64, 33) for index in range(20)}
    source = vectors(ranks, partitioning.subgroup_size(shapes, ranks))
    parameters = [tensor for _, tensor in partitioning.stage3(source, shapes)]
    parts = partitioning.partition_parameters(parameters, target)
    return sum(1 for part in parts for extent in part.extents if extent.path != ZEROS)


def test_runs_grow_with_the_ranks_not_with_their_product():
    small, large = steps_of_planning(16, 24), steps_of_planning(64, 96)
    assert large < 4.5 * small
