"""A folder of torch's distributed checkpoints as a ``SavedState``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.dcp import boxes, metadata
from converters.dcp.boxes import LocatedTensor
from converters.dcp.entries.description import Description, ItemPlace
from converters.dcp.items import ItemReader
from converters.dcp.keys import layouts
from converters.dcp.keys.leaves import Leaf
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import stores

_ITEMS_OF_RANK = LazyPattern(r"__(\d{1,9})_\d+\.distcp")


class DcpState:
    """The state that ``.metadata`` describes; see ``SavedState``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.description: Description = metadata.read(folder)
        self.reader = ItemReader()

    @cached_property
    def leaves(self) -> Sequence[Leaf]:
        """The leaves in the order of the planner's keys,
        then those that it has none for."""
        tensors, objects, keys = self.description[1:4]
        names = dict.fromkeys((*keys, *tensors, *objects))
        stored = [name for name in names if name in tensors or name in objects]
        guessed = layouts.keys_of_names(name for name in stored if name not in keys)
        return [Leaf(name, keys.get(name) or guessed[name], name in tensors) for name in stored]

    @cached_property
    def world_size(self) -> int:
        """The ranks that described something, or whose files hold something."""
        paths = {place.path for place in self._places(leaf.name for leaf in self.leaves)}
        matches = [_ITEMS_OF_RANK.fullmatch(path.name) for path in paths]
        ranks = {match[1] for match in matches if match}
        return max(self.description.rank_count, len(ranks))

    def tensor(self, name: str) -> LocatedTensor:
        """A tensor, put together from its chunks."""
        return boxes.located(self.reader, self.folder, name, self.description.tensors[name])

    def value(self, name: str) -> Any:
        """An object that was saved by itself."""
        return self.reader.read(name, self.description.objects[name]).root

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The ``.distcp`` files of leaves; none has a digest of its own."""
        return dict.fromkeys(sorted({place.path for place in self._places(names)}))

    def cut_file(self, names: Iterable[str]) -> str | None:
        """A line on a file that ends before a leaf of these does;
        ``None`` where none is cut short.

        ``CheckpointError`` for a file that is not there.
        """
        ends: dict[Path, int] = {}
        for place in self._places(names):
            ends[place.path] = max(ends.get(place.path, 0), place.offset + place.nbytes)

        for path, end in sorted(ends.items()):
            try:
                size = stores.status(path).size
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror or error}", "incomplete") from error
            if size < end:
                return (
                    f"{path} has {size} bytes, expected {end} or more; it is cut short: copy it "
                    "again from where it was saved"
                )
        return None

    def _places(self, names: Iterable[str]) -> Iterable[ItemPlace]:
        for name in names:
            if name in self.description.objects:
                yield self.description.objects[name]
            else:
                yield from (chunk.place for chunk in self.description.tensors[name].chunks)
