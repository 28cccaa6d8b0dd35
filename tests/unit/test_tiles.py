"""Boxes of tensors and tensors of tiles, against numpy and torch."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib
from safetensors.torch import load_file

from converters import cast
from converters.computing.computed import computed
from converters.errors import CheckpointError
from converters.execute import shards
from converters.execute.virtual_file import Serving
from converters.formats import safetensors
from converters.storage import open_files
from converters.tensors import Checksum, DType, Extent, TensorRef, Weights

Array = np.ndarray


class Files:
    """A file that arrays are laid down in, in pieces that lie apart."""

    def __init__(self, folder: Path):
        self.path = folder / "arrays"
        self.data = bytearray()

    def store(self, array: Array, piece_count: int = 1) -> TensorRef:
        """The array as a tensor of this many runs."""
        elements = np.ascontiguousarray(array).reshape(-1)
        extents = []
        for piece in np.array_split(elements, piece_count):
            self.data += b"-" * 6
            extents.append(Extent(self.path, len(self.data), piece.nbytes))
            self.data += piece.tobytes()

        self.path.write_bytes(self.data)
        return TensorRef(DType.I16, array.shape, tuple(extents))


def values_of(ref: TensorRef) -> Array:
    """What is read of a tensor, which has to be what its runs say one by one."""
    values = cast.load(ref)
    runs = b"".join(map(open_files.read_extent, ref.extents))
    assert runs == values.tobytes()
    assert len(ref.extents) == sum(1 for _ in ref.extents)
    return values.reshape(ref.shape)


@st.composite
def _grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    """A shape, and where each of its axes is cut."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    cuts = [sorted(draw(st.sets(st.integers(1, size), max_size=2)) | {0, size}) for size in shape]
    return tuple(shape), cuts


def _box(data: st.DataObject, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    offsets = [data.draw(st.integers(0, size)) for size in shape]
    sizes = [
        data.draw(st.integers(0, size - first)) for size, first in zip(shape, offsets, strict=True)
    ]
    return offsets, sizes


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))


@settings(deadline=None, max_examples=60)
@given(grid=_grids(), data=st.data())
def test_tiles_and_their_boxes_have_the_values_that_numpy_has(
    tmp_path_factory: pytest.TempPathFactory,
    grid: tuple[tuple[int, ...], list[list[int]]],
    data: st.DataObject,
) -> None:
    shape, cuts = grid
    files = Files(tmp_path_factory.mktemp("grid"))
    whole = np.arange(np.prod(shape), dtype="<i2").reshape(shape)
    placements = []
    for low in product(*(axis[:-1] for axis in cuts)):
        high = [axis[axis.index(first) + 1] for first, axis in zip(low, cuts, strict=True)]
        part = whole[_slices(low, np.subtract(high, low))]
        placements.append((low, files.store(part, data.draw(st.integers(1, 3)))))

    tiled = TensorRef.tile(shape, placements)
    assert (values_of(tiled) == whole).all()

    offsets, sizes = _box(data, shape)
    box, expected = tiled.box(offsets, sizes), whole[_slices(offsets, sizes)]
    assert (values_of(box) == expected).all()
    inner_offsets, inner_sizes = _box(data, sizes)
    inner = expected[_slices(inner_offsets, inner_sizes)]
    assert (values_of(box.box(inner_offsets, inner_sizes)) == inner).all()

    doubled = TensorRef.tile(
        (2 * shape[0], *shape[1:]),
        [((0,) * len(shape), tiled), ((shape[0], *[0] * (len(shape) - 1)), tiled)],
    )
    assert (values_of(doubled) == np.concatenate([whole, whole])).all()

    start = data.draw(st.integers(0, whole.size))
    count = data.draw(st.integers(0, whole.size - start))
    assert (values_of(tiled.narrow(start, count)) == whole.reshape(-1)[start : start + count]).all()


def test_a_box_of_a_tensor_under_another_shape_is_that_of_numpy(tmp_path: Path) -> None:
    whole = np.arange(6 * 8 * 5, dtype="<i2").reshape(6, 8, 5)
    files = Files(tmp_path)
    halves = [((0, 0, 0), files.store(whole[:, :3])), ((0, 3, 0), files.store(whole[:, 3:], 4))]
    box = TensorRef.tile(whole.shape, halves).view(48, 5).box((3, 1), (20, 3))
    assert (values_of(box) == whole.reshape(48, 5)[3:23, 1:4]).all()


def test_tiles_that_follow_each_other_become_a_list_of_runs(tmp_path: Path) -> None:
    whole = np.arange(24, dtype="<i2").reshape(6, 4)
    files = Files(tmp_path)
    lower, upper = files.store(whole[3:]), files.store(whole[:3])
    tiled = TensorRef.tile((6, 4), [((3, 0), lower), ((0, 0), upper)])
    assert tuple(tiled.extents) == (*upper.extents, *lower.extents)
    assert isinstance(tiled.extents, tuple)


@pytest.mark.parametrize(
    ("placements", "reason"),
    [
        ([((0, 0), (2, 3))], "tiles cover 6 elements of 12"),
        ([((0, 0), (2, 4)), ((0, 2), (2, 2))], "overlap"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "not in"),
        ([((0, 0), (2, 3)), ((0, 3), (2, 3)), ((0, 2), (2, 2))], "overlap"),
    ],
)
def test_tiles_that_do_not_cover_each_element_once_are_refused(
    placements: list[tuple[tuple[int, int], tuple[int, int]]], reason: str
) -> None:
    shape = (2, 6) if len(placements) != 3 else (2, 8)
    refs = [
        (offsets, TensorRef(DType.I16, sizes, (Extent(Path("a"), 0, 2 * sizes[0] * sizes[1]),)))
        for offsets, sizes in placements
    ]
    with pytest.raises(ValueError, match=reason):
        TensorRef.tile(shape, refs)


def test_a_box_outside_of_the_tensor_is_refused() -> None:
    ref = TensorRef(DType.I16, (2, 3), (Extent(Path("a"), 0, 12),))
    for offsets, sizes in (((0, 1), (2, 3)), ((-1, 0), (1, 1)), ((0, 0), (3, 1))):
        with pytest.raises(ValueError, match="is not in"):
            ref.box(offsets, sizes)


def test_a_computed_tensor_has_no_bytes_to_cut_boxes_of() -> None:
    ref = TensorRef(DType.I16, (2, 3), (Extent(Path("a"), 0, 12),))
    made = computed(DType.I16, (2, 3), (ref,), "made", None)
    with pytest.raises(TypeError, match="no bytes"):
        made.box((0, 0), (1, 1))
    with pytest.raises(TypeError, match="no bytes"):
        TensorRef.tile((2, 3), [((0, 0), made)])


def test_a_row_parallel_model_of_70_billion_parameters_is_planned_in_a_megabyte() -> None:
    paths = [Path(f"rank{rank}") for rank in range(8)]
    shard_sets = [
        [((0, rank * width // 8), _f32(paths[rank], (8192, width // 8), 4096)) for rank in range(8)]
        for width in (8192, 28672) * 80
    ]

    tracemalloc.start()
    TensorRef.tile((8192, 8192), shard_sets[0])  # what is made once
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    plan = [
        TensorRef.tile((8192, width), shard_set)
        for width, shard_set in zip((8192, 28672) * 80, shard_sets, strict=True)
    ]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(ref.extents) for ref in plan) == 160 * 8192 * 8
    assert peak - before <= 1 << 20

    start = time.process_time()
    for width, shard_set in zip((8192, 28672) * 80, shard_sets, strict=True):
        TensorRef.tile((8192, width), shard_set)
    assert time.process_time() - start <= 0.1


def _f32(path: Path, shape: tuple[int, ...], offset: int = 0) -> TensorRef:
    return TensorRef(DType.F32, shape, (Extent(path, offset, 4 * shape[0] * shape[1]),))


def _sharded(
    folder: Path, whole: torch.Tensor, count: int, axis: int
) -> tuple[TensorRef, tuple[Checksum, ...]]:
    """A tensor cut into shards, each in a file of its own, and put together again."""
    placements, checksums, first = [], [], 0
    for rank, part in enumerate(torch.chunk(whole, count, axis)):
        path = folder / f"rank{rank}"
        data = part.contiguous().numpy().tobytes()
        path.write_bytes(data)
        offsets = [0] * whole.dim()
        offsets[axis] = first
        placements.append((offsets, _f32(path, tuple(part.shape))))
        checksums.append(Checksum(Extent(path, 0, len(data)), isal_zlib.crc32(data)))
        first += part.shape[axis]

    return TensorRef.tile(tuple(whole.shape), placements), tuple(checksums)


@pytest.mark.parametrize("dtype", [None, DType.BF16])
@pytest.mark.parametrize(
    ("shape", "count", "axis"),
    [
        ((1024, 2816), 8, 1),
        ((300, 1000), 3, 1),
        ((700, 96), 4, 1),
        ((64, 24), 8, 1),
        ((9, 70), 2, 0),
    ],
)
def test_shards_are_written_as_torch_joins_them_and_every_crc32_is_proven(
    tmp_path: Path, shape: tuple[int, int], count: int, axis: int, dtype: DType | None
) -> None:
    whole = torch.randn(shape)
    ref, checksums = _sharded(tmp_path, whole, count, axis)
    weights = Weights({"w": ref}, checksums=checksums)
    report = shards.execute(safetensors.plan(weights, dtype, 1 << 40, "keep"), tmp_path / "out")

    expected = torch.cat(torch.chunk(whole, count, axis), axis)
    written = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(written, expected if dtype is None else expected.bfloat16())
    assert report.checked == report.read == ref.nbytes


@pytest.mark.parametrize("verify", [True, False])
def test_all_rows_of_a_shard_in_a_piece_are_read_at_once(
    tmp_path: Path, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.storage import local_store

    calls = []
    for name in ("read_into", "read_scattered"):
        original = getattr(local_store.LocalFile, name)

        def counted(self: object, *args: object, original: object = original) -> int:
            calls.append(args)
            return int(original(self, *args))  # type: ignore[operator]

        monkeypatch.setattr(local_store.LocalFile, name, counted)

    whole = torch.randn(256, 8192)
    ref, checksums = _sharded(tmp_path, whole, 4, 1)
    plan = safetensors.plan(Weights({"w": ref}, checksums=checksums), None, 1 << 40, "keep")
    shards.execute(plan, tmp_path / "out", shards.CheckOptions(verify=verify))
    assert len(calls) == 4 * ref.nbytes // (2 << 20)


def test_a_shard_that_was_damaged_is_named(tmp_path: Path) -> None:
    ref, checksums = _sharded(tmp_path, torch.randn(512, 512), 4, 1)
    with (tmp_path / "rank2").open("r+b") as file:
        file.seek(1234)
        byte = file.read(1)[0]
        file.seek(1234)
        file.write(bytes([byte ^ 1]))

    plan = safetensors.plan(Weights({"w": ref}, checksums=checksums), None, 1 << 40, "keep")
    with pytest.raises(CheckpointError, match=r"rank2 is damaged"):
        shards.execute(plan, tmp_path / "out")


@pytest.mark.parametrize("served", [False, True])
def test_replicas_that_differ_in_one_bit_are_refused_by_name(tmp_path: Path, served: bool) -> None:
    values = torch.randn(300, 7).numpy()
    paths = [tmp_path / f"rank{rank}" for rank in range(3)]
    for path in paths:
        path.write_bytes(values.tobytes())

    ref, *others = (_f32(path, (300, 7)) for path in paths)
    plan = safetensors.plan(
        Weights({"norm.weight": replace(ref, replicas=tuple(others))}), None, 1 << 40, "keep"
    )
    shards.execute(plan, tmp_path / "out")

    data = bytearray(values.tobytes())
    data[5000] ^= 1
    paths[2].write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"rank2 holds other values of norm\.weight than .*rank0"
    ):
        if served:
            with Serving(plan).open(plan.shards[0]) as file:
                file.read()
        else:
            shards.execute(plan, tmp_path / "again")


def test_a_damaged_replica_is_called_damaged(tmp_path: Path) -> None:
    values = torch.randn(300, 7).numpy().tobytes()
    paths = [tmp_path / f"rank{rank}" for rank in range(2)]
    for path in paths:
        path.write_bytes(values)
    checksums = tuple(
        Checksum(Extent(path, 0, len(values)), isal_zlib.crc32(values)) for path in paths
    )
    paths[1].write_bytes(bytes([values[0] ^ 1]) + values[1:])
    ref, other = (_f32(path, (300, 7)) for path in paths)
    weights = Weights({"w": replace(ref, replicas=(other,))}, checksums=checksums)
    with pytest.raises(CheckpointError, match="rank1 is damaged"):
        shards.execute(safetensors.plan(weights, None, 1 << 40, "keep"), tmp_path / "out")


def test_boxes_and_tiles_keep_the_replicas_of_their_parts(tmp_path: Path) -> None:
    files = Files(tmp_path)
    array = np.arange(12, dtype="<i2").reshape(4, 3)
    ref = replace(files.store(array), replicas=(files.store(array + 1),))
    other = files.store(array + 5)
    tiled = TensorRef.tile((4, 6), [((0, 0), ref), ((0, 3), other)])
    (replica,) = tiled.replicas
    assert (values_of(replica) == np.concatenate([array + 1, array + 5], 1)).all()
    (of_box,) = tiled.box((1, 2), (2, 3)).replicas
    assert (values_of(of_box) == values_of(replica)[1:3, 2:5]).all()
