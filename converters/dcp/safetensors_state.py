"""Chunks of tensors in safetensors files,
as torch's HuggingFaceStorageWriter writes them.

    shard-0000R-model-0000N-of-0000M.safetensors
        __metadata__    DCP_SHARDING_INFO: {NAME: {"saved_offsets": [...]}} as a text
        NAME            the chunk, with its own shape

A tensor is as large as its chunks reach. What is not named there is whole. There is no
``.metadata``.

Source: torch 2.13 ``distributed/checkpoint/hf_storage.py`` and ``_hf_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.accessors import is_whole_number
from converters.dcp import boxes
from converters.dcp.boxes import Box, LocatedTensor
from converters.dcp.entries.description import Shape
from converters.dcp.keys.leaves import Leaf
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.storage import bounded_json, open_files, stores
from converters.tensors import Checksum, TensorRef
from converters.walks import described, sums
from converters.words import counted, numbers, with_article

_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of a piece that two files have


class SafetensorsState:
    """A folder of such files; see ``SavedState``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.boxes: dict[str, list[Box]] = {}
        self.paths: dict[str, list[Path]] = {}
        self.file_names = [
            name for name in stores.names(folder) if filenames.DCP_SAFETENSORS.fullmatch(name)
        ]
        self._require_all_files()
        for file_name in self.file_names:
            self._read(folder / file_name)

    def _require_all_files(self) -> None:
        """``CheckpointError`` where the numbers in the names of files have a gap."""
        parts_by_rank: dict[int, dict[int, int]] = {}
        names_by_count: dict[int, str] = {}
        for name in self.file_names:
            _, rank, _, part, _, count = name.removesuffix(".safetensors").split("-")
            parts_by_rank.setdefault(int(rank), {})[int(part)] = int(count)
            names_by_count.setdefault(int(count), name)

        if len(names_by_count) > 1:  # all ranks have the count of the coordinator's plan
            raise CheckpointError(
                f"{self.folder} has {' and '.join(sorted(names_by_count.values()))}, whose names "
                "give different numbers of files: two saves wrote into it; move the files of the "
                "older one away"
            )

        lacks_rank = len(parts_by_rank) != max(parts_by_rank, default=0)
        if lacks_rank or any(len(p) != max(p.values()) for p in parts_by_rank.values()):
            raise CheckpointError(
                f"{self.folder} has {counted(len(self.file_names), 'file')} of "
                f"{counted(max(parts_by_rank), 'rank')}, and some are missing: copy all "
                "shard-*-model-*.safetensors here from where they were saved",
                "incomplete",
            )

    def _read(self, path: Path) -> None:
        tensors = safetensors.read(path).tensors
        offsets_by_name = _offsets(path)
        for name, tensor in tensors.items():
            offsets = offsets_by_name.get(name, (0,) * len(tensor.shape))
            if len(offsets) != len(tensor.shape):
                raise CheckpointError(
                    f"{path} has {name} ({described(tensor.shape)}) at {numbers(offsets)}, which "
                    "is not a place in a tensor of so many axes"
                )
            self.boxes.setdefault(name, []).append(Box(offsets, tensor))
            self.paths.setdefault(name, []).append(path)

    @property
    def leaves(self) -> Sequence[Leaf]:
        """The tensors; nothing else is stored so."""
        return [Leaf(name, (name,), True) for name in self.boxes]

    @property
    def world_size(self) -> int:
        """The ranks that wrote files, by their numbers."""
        return len({name.split("-")[1] for name in self.file_names})

    def tensor(self, name: str) -> LocatedTensor:
        """A tensor, put together from its chunks; those of one place are replicas.

        ``CheckpointError`` where such differ, or chunks are missing.
        """
        boxes_by_offsets: dict[Shape, list[Box]] = {}
        for box in self.boxes[name]:
            boxes_by_offsets.setdefault(box.offsets, []).append(box)

        placed = [_joined(name, replicas) for replicas in boxes_by_offsets.values()]
        ends = (sums(box.offsets, box.tensor.shape) for box in placed)
        shape = tuple(map(max, zip(*ends, strict=True)))
        boxes.require_numel(self.folder, name, shape, [box.tensor.shape for box in placed])
        tensor = boxes.joined(self.folder, name, shape, placed)
        extents = [extent for box in placed for extent in box.tensor.extents]
        return LocatedTensor(tensor, tuple(Checksum(extent, None) for extent in extents))

    def value(self, name: str) -> Any:
        """There are none."""
        raise KeyError(name)

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The files of some tensors; they have no digests."""
        return dict.fromkeys(path for name in names for path in self.paths[name])


def _joined(name: str, boxes_there: Sequence[Box]) -> Box:
    """The box of a place with its replicas,
    which are compared whole while the tensor is moved.

    ``CheckpointError`` where one is of another type or shape, or differs in a sample.
    """
    first, *replicas = boxes_there
    for box in replicas:
        kinds = [(part.tensor.dtype, part.tensor.shape) for part in (first, box)]
        if kinds[0] == kinds[1] and _samples(first.tensor) == _samples(box.tensor):
            continue
        paths = [part.tensor.extents[0].path for part in (first, box)]
        raise CheckpointError(
            f"{paths[0]} and {paths[1].name} have different pieces of {name} at "
            f"{numbers(first.offsets)}: they are of different saves; move the files of the older "
            "one away"
        )
    tensors = tuple(box.tensor for box in replicas)
    return Box(first.offsets, replace(first.tensor, replicas=tensors))


def _samples(tensor: TensorRef) -> list[bytes]:
    """Bytes of a piece, from its first to its last in even steps; of a small one all."""
    samples: list[bytes] = []
    for extent in tensor.extents:
        last_start = max(0, extent.length - _SAMPLE_BYTES)
        starts = sorted({last_start * step // _SAMPLES for step in range(_SAMPLES + 1)})
        ranges = [(extent.offset + start, min(_SAMPLE_BYTES, extent.length)) for start in starts]
        with open_files.opened(extent.path) as file:
            samples += file.read(ranges)

    return samples


def _offsets(path: Path) -> dict[str, Shape]:
    """Where the chunks in a file belong; ``CheckpointError`` for what says no place."""
    text = safetensors.metadata(path).get(_SHARDING)
    if text is None:
        return {}
    try:
        sharding = bounded_json.loads(text.encode())
    except ValueError:
        sharding = None

    if not isinstance(sharding, dict):
        raise CheckpointError(f"{path} has {with_article(_SHARDING)} that is not an object of JSON")

    offsets: dict[str, Shape] = {}
    for name, info in sharding.items():
        values = info.get(_OFFSETS) if isinstance(info, dict) else None
        if not isinstance(values, list) or not all(map(is_whole_number, values)):
            raise CheckpointError(f"{path} does not say where its piece of {name} belongs")
        offsets[name] = tuple(values)
    return offsets
