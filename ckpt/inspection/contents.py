"""The tensors of a checkpoint that are looked at: its weights, or one state of its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt.folders import locks
from ckpt.weights.conversion import sources
from ckpt.weights.opening import unusual
from converters.errors import CheckpointError
from converters.extents import per_record
from converters.names import selection
from converters.options import STATE
from converters.source import Source
from converters.storage import stores
from converters.tensors import Checksum, TensorRef, Weights
from converters.torch_files import reader, record_checksums
from converters.words import some

WEIGHTS = "weights"
_TORCH_SUFFIXES = (".pt", ".bin", ".pth")


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """The tensors of a checkpoint by name, none of them read.

    ``values_of`` is "weights", or the key of an optimizer state. ``unread`` are tensors
    that are not looked at, each with the reason.
    """

    source: Source
    weights: Weights
    values_of: str = WEIGHTS
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder, or the file, that the tensors lie in."""
        return self.source.place.folder

    def with_only(self, globs: Sequence[str]) -> CheckpointTensors:
        """The tensors whose names match one of the globs, all without any.

        ``CheckpointError`` for a glob that no name matches.
        """
        if not globs:
            return self

        names = selection.chosen((*self.weights.by_every_name(), *self.unread), globs)
        chosen_names = frozenset(names)
        return replace(
            self,
            weights=selection.selected(self.weights, chosen_names),
            unread={name: why for name, why in self.unread.items() if name in chosen_names},
        )


@contextmanager
def opened(
    path: Path, tag: str | None = None, state: str | None = None
) -> Iterator[CheckpointTensors]:
    """The weights of a checkpoint, or with ``state`` what its optimizer keeps under this
    key, such as ``exp_avg_sq``.

    Weights of a training are those that it goes on from, in fp32 where it has them. In
    the block ``ckpt prune`` does not delete the checkpoint. ``CheckpointError`` for what
    cannot be read, and for a state that no parameter has.
    """
    source = sources.as_stored(path, tag, "ckpt to-fp32 --weights 16bit")
    folder = source.place.folder
    lock = locks.reading(folder) if stores.is_folder(folder) else locks.Lock()
    try:
        yield _weights(source) if state is None else _states(source, state)
    finally:
        lock.release()


def _weights(source: Source) -> CheckpointTensors:
    """The weights; of those that no file holds, and of unusual ones, the reasons."""
    kinds = {name: tensor.kind for name, tensor in _unusual(source).items()}
    reasons = {name: f"its type is {kind}" for name, kind in kinds.items()}
    return CheckpointTensors(source, source.weights, unread={**source.weights.absent, **reasons})


def _unusual(source: Source) -> Mapping[str, unusual.Unusual]:
    return {} if source.topology is not None else unusual.tensors_of(source)


def _states(source: Source, key: str) -> CheckpointTensors:
    if source.optimizer is None:
        raise CheckpointError(
            f"{source.place.folder} holds weights only, no optimizer state {key!r}; leave {STATE} "
            "out, or name the checkpoint of a training",
            "incomplete",
        )

    tensors: dict[str, TensorRef] = {}
    keys: dict[str, None] = {}
    for name in source.weights.tensors:
        try:
            state = source.optimizer(name)
        except KeyError:
            continue  # it is not trained
        keys.update((k, None) for k, value in state.items() if isinstance(value, TensorRef))
        value = state.get(key)
        if isinstance(value, TensorRef):
            tensors[name] = value

    if not tensors:
        present = f"it has {some(list(keys), 8)}" if keys else "it has no tensor of a parameter"
        raise CheckpointError(
            f"{source.place.folder}: the optimizer has no state {key!r}; {present}", "refused"
        )

    weights = Weights(tensors, checksums=_checksums(source, tensors.values()))
    return CheckpointTensors(source, weights, key, {})


def _checksums(source: Source, refs: Collection[TensorRef]) -> tuple[Checksum, ...]:
    """Those of the records that states lie in, of files that torch.save wrote."""
    paths = {extent.path for extent in per_record(ref.extents for ref in refs)}
    torch_files = [reader.read(path) for path in sorted(paths) if path.suffix in _TORCH_SUFFIXES]
    return record_checksums.located(refs, torch_files)
