"""A file of ``torch.save`` for each rank of FSDP, with that rank's pieces.

    FSDP2   DTensor: the local tensor; its placements, and the rank's coordinate in the mesh
    FSDP1   ShardedTensor: shards, each with its offsets and sizes

accelerate saves them since 1.15 with ``use_dcp=False``. Both classes stay inert records.
What is not cut is in the file of every rank, and read from the first one's.

Source: accelerate 1.15 ``utils/fsdp_utils.py`` (``save_fsdp_model``), torch 2.13
``distributed/tensor/_api.py``, ``placement_types.py`` (``Shard``, ``_StridedShard``),
``distributed/_shard/sharded_tensor/api.py`` (``__getstate__``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from converters.accessors import is_whole_number
from converters.dcp import boxes, torch_state
from converters.dcp.boxes import Box, LocatedTensor
from converters.dcp.entries.description import Shape
from converters.dcp.keys.leaves import KeyPath, Leaf
from converters.dcp.torch_state import NestedValue
from converters.errors import CheckpointError, MalformedError
from converters.pickles.values import Call, Global
from converters.tensors import Checksum, TensorRef
from converters.torch_files import reader
from converters.torch_files.torch_file import TorchFile
from converters.walks import described

_SHARDED = "ShardedTensor"
_DISTRIBUTED = "DTensor"


class RankPiece(NamedTuple):
    """A rank's part of a tensor, and the file that it is in."""

    record: Call
    file: TorchFile


class _Placement(NamedTuple):
    """How an axis of a mesh cuts a tensor: along ``dim``; ``None`` for copies."""

    dim: int | None
    is_strided: bool


class FilesOfRanks:
    """The files of all ranks, in their order; see ``SavedState``."""

    def __init__(self, folder: Path, paths: Sequence[Path], prefix: KeyPath = ()):
        self.folder = folder
        self.torch_files = [reader.read(path) for path in paths]
        self.values_by_rank = [
            torch_state.leaves_of(file.path, file.root, prefix) for file in self.torch_files
        ]

    @cached_property
    def leaves(self) -> Sequence[Leaf]:
        """The leaves of all ranks, in the order of the first one."""
        first_values: dict[str, NestedValue] = {}
        for values in reversed(self.values_by_rank):
            first_values = {**values, **first_values} if not first_values else first_values | values
        ordered = dict.fromkeys(name for values in self.values_by_rank for name in values)
        return [
            Leaf(name, first_values[name].keys, _is_tensor(first_values[name].value))
            for name in ordered
        ]

    @property
    def world_size(self) -> int:
        """A file for each rank."""
        return len(self.torch_files)

    def tensor(self, name: str) -> LocatedTensor:
        """A tensor, put together from the pieces of all ranks."""
        value, file = self._first(name)
        if not isinstance(value, Call) or _class_name(value) not in (_SHARDED, _DISTRIBUTED):
            return torch_state.located(value, file)

        pieces = [
            RankPiece(values[name].value, torch_file)
            for values, torch_file in zip(self.values_by_rank, self.torch_files, strict=True)
            if name in values and isinstance(values[name].value, Call)
        ]
        try:
            shape, placed = _placed(pieces)
        except MalformedError as error:
            raise CheckpointError(
                f"{self.folder} has {name} in a form that is not read: {error}", "unsupported"
            ) from error

        by_offsets = {box.offsets: box for box, _ in reversed(placed)}
        sizes = [box.tensor.shape for box in by_offsets.values()]
        boxes.require_numel(self.folder, name, shape, sizes)
        tensor = boxes.joined(self.folder, name, shape, list(by_offsets.values()))
        return LocatedTensor(tensor, _records(placed))

    def value(self, name: str) -> Any:
        """A value of another type, as the first rank has it."""
        return self._first(name)[0]

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The files of all ranks."""
        return {file.path: file.digest for file in self.torch_files}

    def _first(self, name: str) -> tuple[Any, TorchFile]:
        for values, file in zip(self.values_by_rank, self.torch_files, strict=True):
            if name in values:
                return values[name].value, file
        raise KeyError(name)


def _records(placed: Iterable[tuple[Box, TorchFile]]) -> tuple[Checksum, ...]:
    return tuple(
        checksum for box, file in placed for checksum in torch_state.records(box.tensor, file)
    )


def _is_tensor(value: Any) -> bool:
    is_cut = isinstance(value, Call) and _class_name(value) in (_SHARDED, _DISTRIBUTED)
    return is_cut or torch_state.is_tensor(value)


def _class_name(record: Call) -> str | None:
    of = record.of
    is_torchs = isinstance(of, Global) and of.module.startswith("torch.distributed.")
    return of.name if is_torchs and isinstance(of, Global) else None


def _placed(pieces: Sequence[RankPiece]) -> tuple[Shape, list[tuple[Box, TorchFile]]]:
    """The shape of a tensor, and the boxes that ranks have of it."""
    if _class_name(pieces[0].record) == _SHARDED:
        shape = _shape(pieces[0].record.args, 2)
        return shape, [
            (box, piece.file) for piece in pieces for box in _shards(piece.record) if box
        ]

    shape = _shape(pieces[0].record.args, 2)
    specs = [_DTensorSpec.of(piece.record) for piece in pieces]
    # torch before 2.9 does not pickle the mesh's shape in every form: then it is as far
    # as the coordinates reach
    reach = [max(places) + 1 for places in zip(*(spec.coordinate for spec in specs), strict=True)]
    counts = list(map(max, reach, specs[0].mesh_shape or reach))
    placed = [
        (spec.box(shape, counts), piece.file) for spec, piece in zip(specs, pieces, strict=True)
    ]
    return shape, [(box, file) for box, file in placed if box.tensor.numel or not shape]


def _shards(record: Call) -> Iterator[Box]:
    """The shards of a ShardedTensor that a rank has (``__getstate__``:
    first the local ones)."""
    state = record.state
    shards = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(shards, list):
        raise MalformedError("a ShardedTensor has no list of shards")

    for shard in shards:
        fields = _state(shard)
        bounds = _state(fields.get("metadata"))
        tensor = fields.get("tensor")
        offsets = _shape((bounds.get("shard_offsets"),), 0)
        if not isinstance(tensor, TensorRef) or len(offsets) != len(tensor.shape):
            raise MalformedError("a shard has no tensor")
        if tensor.numel:
            yield Box(offsets, tensor)


class _DTensorSpec(NamedTuple):
    """A rank's part of a DTensor: the local tensor, how it is cut, and the rank's place
    in the mesh."""

    tensor: TensorRef
    placements: tuple[_Placement, ...]
    coordinate: Shape
    mesh_shape: Shape | None

    @staticmethod
    def of(record: Call) -> _DTensorSpec:
        """The layout in the record of a DTensor."""
        state = record.state
        attributes = state[1] if isinstance(state, tuple) and len(state) == 2 else None
        fields = attributes if isinstance(attributes, dict) else {}
        spec = _state(fields.get("_spec"))
        tensor = fields.get("_local_tensor")
        placements = spec.get("placements")
        mesh = _state(spec.get("mesh"))
        coordinate = _shape((mesh.get("_coordinate_on_dim"),), 0)
        if not isinstance(tensor, TensorRef) or not isinstance(placements, tuple):
            raise MalformedError("a DTensor has no tensor or no placements")
        if len(placements) != len(coordinate):
            raise MalformedError("a DTensor has another number of placements than its mesh of axes")

        mesh_shape = _mesh_shape(mesh)
        if mesh_shape is not None and len(mesh_shape) != len(coordinate):
            mesh_shape = None
        return _DTensorSpec(tensor, tuple(map(_placement, placements)), coordinate, mesh_shape)

    def box(self, shape: Shape, counts: Sequence[int]) -> Box:
        """The part, placed in the tensor.
        ``counts`` are the ranks on each axis of the mesh.

        A strided shard is cut after the axes behind it have cut the same dimension: FSDP
        of what tensor parallelism cut before.
        """
        offsets, sizes = [0] * len(shape), list(shape)
        cuts = list(zip(self.placements, self.coordinate, counts, strict=True))
        for placement, position, count in sorted(cuts, key=lambda axis: axis[0].is_strided):
            dim = placement.dim
            if dim is None:
                continue
            if dim >= len(shape):
                raise MalformedError(f"a tensor of {described(shape)} is cut along dimension {dim}")
            step = -(-sizes[dim] // count)
            first = min(position * step, sizes[dim])
            offsets[dim] += first
            sizes[dim] = min(step, sizes[dim] - first)

        if self.tensor.shape != tuple(sizes):
            raise MalformedError(
                f"a rank has {described(self.tensor.shape)} of it, expected "
                f"{described(tuple(sizes))}"
            )
        return Box(tuple(offsets), self.tensor)


def _mesh_shape(mesh: Mapping[str, Any]) -> Shape | None:
    """The ranks on each axis of a mesh: torch 2.13 has a layout for each axis, 2.9 one
    for all, and before there is a tensor of the ranks."""
    ranks = mesh.get("mesh")
    if isinstance(ranks, TensorRef):
        return ranks.shape

    layout = _state(mesh.get("_layout"))
    axes = layout.get("axes")
    sizes = layout.get("shape")
    if isinstance(axes, tuple):
        sizes = tuple(_state(axis).get("shape") for axis in axes)
    if is_whole_number(sizes):
        return (sizes,)
    return tuple(map(_product, sizes)) if isinstance(sizes, tuple) else None


def _product(sizes: Any) -> int:
    """The product of the numbers in nested tuples."""
    if isinstance(sizes, tuple):
        return prod(map(_product, sizes))
    return sizes if is_whole_number(sizes) else 0


def _placement(record: Any) -> _Placement:
    name = _class_name(record) if isinstance(record, Call) else None
    if name == "Replicate":
        return _Placement(None, False)

    dim = _state(record).get("dim")
    if name not in ("Shard", "_StridedShard") or not is_whole_number(dim):
        raise MalformedError(f"a placement is {name or 'no class of torch'}, expected Shard")
    return _Placement(dim, name == "_StridedShard")


def _state(record: Any) -> Mapping[str, Any]:
    """The fields of a record; of those with slots the second part."""
    state = record.state if isinstance(record, Call) else None
    if isinstance(state, tuple) and len(state) == 2:
        state = state[1] if state[0] is None else state[0]
    return state if isinstance(state, dict) else {}


def _shape(arguments: Sequence[Any], index: int) -> Shape:
    """A tuple or list of whole numbers among some values."""
    value = arguments[index] if len(arguments) > index else None
    if not isinstance(value, (tuple, list)) or not all(map(is_whole_number, value)):
        raise MalformedError("a piece has no shape, offsets or coordinate")
    return tuple(value)
