"""The files of a folder of DCP, planned: items back to back,
and ``.metadata`` behind them all.

    __0_0.distcp, __1_0.distcp, ...    the items of each of the files that were asked for
    .metadata                          last: a folder without it is none

A large tensor is cut along its first axis, as ``fully_shard`` cuts it for as many ranks,
so that each of so many ranks reads one file. Others lie whole in the file that has the
fewest bytes. What is the same bytes twice (tied names, a step that a group counts once)
is stored once, and named twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from converters.dcp.writing import metadata
from converters.dcp.writing.items import Number, PlainObject, TorchItem, Value, item
from converters.dcp.writing.metadata import (
    Chunk,
    ItemSpan,
    ObjectRecord,
    Path,
    Shape,
    TensorRecord,
    dotted,
)
from converters.plan import Placement, Shard
from converters.tensors import DType, TensorRef

OPTIMIZER = "optimizer"  # the key of the state dict that all layouts have it under
MIN_CUT_BYTES = 1 << 16  # of a tensor that is cut; an item takes about 1 kB beside its bytes


class StateEntry(NamedTuple):
    """A value of the state dict under its path there."""

    path: Path
    value: Value

    @property
    def is_state(self) -> bool:
        """Whether it is what an optimizer keeps for a parameter."""
        is_of_optimizer = self.path[0] == OPTIMIZER and len(self.path) > 1
        return is_of_optimizer and str(self.path[1]).partition(".")[0] == "state"


@dataclass(slots=True)
class _DistcpFile:
    """A ``.distcp`` file while items are added to it."""

    filename: str
    nbytes: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    crc_slots: list[tuple[int, str]] = field(default_factory=list)

    def add(self, new_item: TorchItem) -> ItemSpan:
        """Puts an item behind the others."""
        start = self.nbytes
        self.literals += ((start + offset, data) for offset, data in new_item.literals)
        self.crc_slots += ((start + offset, name) for offset, name in new_item.crc_slots)
        self.placements += (
            replace(placement, offset=start + placement.offset) for placement in new_item.placements
        )
        self.nbytes += new_item.nbytes
        return ItemSpan(self.filename, start, new_item.nbytes)

    def shard(self, folder: str) -> Shard:
        """The whole file, by its name from the output's folder on."""
        return Shard(
            f"{folder}{self.filename}",
            self.nbytes,
            tuple(self.literals),
            tuple(self.placements),
            tuple(self.crc_slots),
        )


def shards(folder: str, entries: Sequence[StateEntry], file_count: int) -> list[Shard]:
    """The files of a folder; ``folder`` is empty for the output itself, or ends in "/".

    ``file_count`` of them hold items, or fewer where there are not so many.
    """
    writer = _FolderWriter([_DistcpFile(f"__{rank}_0.distcp") for rank in range(file_count)])
    records = [writer.add(entry) for entry in entries]
    files = [file.shard(folder) for file in writer.files if file.nbytes]

    data = metadata.content(records)
    return [*files, Shard(f"{folder}{metadata.NAME}", len(data), ((0, data),), ())]


class _FolderWriter:
    """Puts entries into files; remembers what is there already."""

    def __init__(self, files: Sequence[_DistcpFile]):
        self.files = files
        self.tensors: dict[int, TensorRecord] = {}
        self.objects: dict[bytes, ItemSpan] = {}
        self.alive: list[TensorRef] = []  # keeps what is known by its id alive

    def add(self, entry: StateEntry) -> TensorRecord | ObjectRecord:
        """Puts a value into files, unless it is there, and says where it lies."""
        path, value = entry
        match value:
            case TensorRef():
                if id(value) not in self.tensors:
                    self.alive.append(value)
                    chunks = [*self._chunks(dotted(path), value)]
                    self.tensors[id(value)] = TensorRecord(path, value.dtype, value.shape, chunks)
                return self.tensors[id(value)]._replace(path=path)
            case Number():
                chunk = Chunk((), (), self._small(value))
                return TensorRecord(path, DType.F32, (), [chunk])
            case PlainObject():
                return ObjectRecord(path, self._small(value))

    def _small(self, value: Number | PlainObject) -> ItemSpan:
        """Where a value without bytes of the source lies: equal ones are stored once."""
        new_item = item("", value)
        content = b"".join(literal for _, literal in new_item.literals)
        if content not in self.objects:
            self.objects[content] = self._emptiest().add(new_item)
        return self.objects[content]

    def _chunks(self, name: str, tensor: TensorRef) -> Iterator[Chunk]:
        boxes = list(_cuts(tensor, len(self.files)))
        for number, (offsets, part) in enumerate(boxes):
            file = self.files[number] if len(boxes) > 1 else self._emptiest()
            label = f"{name} from {offsets}" if len(boxes) > 1 else name
            yield Chunk(offsets, part.shape, file.add(item(label, part)))

    def _emptiest(self) -> _DistcpFile:
        return min(self.files, key=lambda file: file.nbytes)


def _cuts(tensor: TensorRef, count: int) -> Iterator[tuple[Shape, TensorRef]]:
    """The parts of a tensor along its first axis, each with its first element."""
    inner_axes = (0,) * (len(tensor.shape) - 1)
    if count == 1 or tensor.nbytes < MIN_CUT_BYTES or not tensor.shape:
        yield (0,) * len(tensor.shape), tensor
        return

    rows = tensor.shape[0]
    row_numel = tensor.numel // rows
    rows_of_part = -(-rows // count)
    for first_row in range(0, rows, rows_of_part):
        row_count = min(rows_of_part, rows - first_row)
        part = tensor.narrow(first_row * row_numel, row_count * row_numel)
        yield (first_row, *inner_axes), part.view(row_count, *tensor.shape[1:])
