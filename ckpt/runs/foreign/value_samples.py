"""Whether a sample of a checkpoint's fp32 weights rounds to its 16-bit ones,
file by file.

The optimizer files of the ranks hold the fp32 weights, the model file (under ZeRO-3 what
was gathered beside the states) the same in 16 bits. So files of two saves, which fit
together by names and shapes, show by their values that they do not belong together.
Values that are equal in both saves, as those of a LayerNorm may be, show nothing: every
file is asked in many places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.runs.foreign import signs
from converters.detect.deepspeed import NATIVE
from converters.errors import CheckpointError
from converters.formats import gathered_16bit
from converters.names.selection import proving
from converters.source import Source
from converters.storage import open_files
from converters.storage.checksums import Ledger
from converters.storage.store import is_url
from converters.tensors import DType, TensorRef, Weights
from converters.tiles import Tiled
from converters.words import shell_word
from converters.zero import weights_16bit
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.discovery import is_tag_folder

_PLACES = 64  # in a file, at most
_MANY_PLACES = 2048  # where all bytes are read anyway: 3 MiB of a file
_REMOTE_PLACES = 64  # in all files of a remote store together, or one in each
_TILED_PLACES = 16  # in a tensor that model-parallel ranks share
_NUMBERS = 256  # that are compared in each place


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """The files whose values were compared,
    and the first two that contradict each other.

    ``contradiction`` is the name of a tensor, the file of its fp32 values and that of
    the 16-bit ones; ``None`` where all that was compared is equal.
    """

    paths: frozenset[Path]
    contradiction: tuple[str, Path, Path] | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some numbers of a tensor, where they are stored a second time, and the files of both."""

    name: str
    value: TensorRef
    copy: TensorRef
    paths: tuple[Path, Path]

    @staticmethod
    def of(name: str, value: TensorRef, copy: TensorRef, start: int, count: int) -> _Sample:
        """``count`` numbers from ``start`` on."""
        value, copy = value.narrow(start, count), copy.narrow(start, count)
        return _Sample(name, value, copy, (value.extents[0].path, copy.extents[0].path))


def compare(source: Source) -> SampleComparison:
    """Compares numbers of each file of a checkpoint of DeepSpeed,
    a few thousand of each."""
    weights = source.weights
    if not weights.copies:
        weights, _ = gathered_16bit.attach(weights, source.place.root)

    return _compared(weights)


def require_same(source: Source, remedy: str) -> None:
    """``CheckpointError`` where the model file
    of DeepSpeed holds other values than the states.

    ``remedy`` says what to do.
    """
    if (difference := difference_in(source)) is not None:
        raise CheckpointError(f"{difference}: {remedy}")


def require_alike(source: Source, path: Path) -> None:
    """The same by a few thousand numbers of each file,
    which a look at a checkpoint can read.

    ``path`` is the checkpoint as it is called, which the remedy names.
    """
    if (difference := _difference(source.weights, _PLACES)) is not None:
        raise CheckpointError(f"{difference}: {remedy_of(source, path)}")


def difference_in(source: Source) -> str | None:
    """That the model file of DeepSpeed holds other values than the states;
    ``None`` if not.

    Of each file half a million numbers are compared, at both ends and in the middle of
    every run of bytes, so that no file of another save passes whose values are others.
    In a remote store, where each look takes as long as a megabyte, a few are compared of
    each file. ``CheckpointError`` for a damaged record.
    """
    is_remote = is_url(source.place.root)
    remote_places = max(1, _REMOTE_PLACES // source.world_size)
    return _difference(source.weights, remote_places if is_remote else _MANY_PLACES)


def _difference(weights: Weights, places: int) -> str | None:
    contradiction = _compared(weights, places).contradiction
    if contradiction is None:
        return None

    name, value_path, copy_path = contradiction
    refs = (weights.tensors[name], weights.copies[name])
    Ledger().check(proving(refs, weights.checksums))
    return (
        f"{copy_path} holds other values of {name} than {value_path}, whose weights do not round "
        "to them"
    )


def remedy_of(source: Source, path: Path) -> str:
    """Why the values may differ, and what to do with a checkpoint that nobody committed."""
    why = "these files are of different saves"
    if isinstance(source, Checkpoint):
        why = weights_16bit.disagreement(source)
    way = ""
    has_own_folder = signs.is_name(path.name) and not is_tag_folder(path)
    if has_own_folder and source.kind in NATIVE:
        way = (
            f", or, if you changed the weights yourself, ckpt doctor {shell_word(path)} --adopt "
            "--one-save commits it as it is"
        )
    elif isinstance(source, Checkpoint):
        way = (
            ", or, if the training changes weights after each step, resume it by name: "
            f'ckpt.resume(engine, run, tag="{source.place.tag}", load_foreign=True)'
        )
    return f"{why}; bring back the files of one save{way}"


def compare_beside(
    source: Source, attach: Callable[[Weights], Weights] | None = None
) -> SampleComparison:
    """The same with the weights that a trainer saved beside DeepSpeed's files.

    ``attach`` gives the weights the copies beside them; without it those of the same
    names. Nothing with ZenFlow, whose fp32 weights lag behind.
    """
    model = source.model if isinstance(source, Checkpoint) else None
    if model is not None and model.setting("zero_optimization", "zenflow"):
        return SampleComparison(frozenset())

    weights = replace(source.weights, copies={})
    if attach is None:
        weights, _ = gathered_16bit.attach(weights, source.place.root)
    else:
        weights = attach(weights)
    others = other_precisions(source.precision)
    copies = {name: copy for name, copy in weights.copies.items() if copy.dtype not in others}
    return _compared(replace(weights, copies=copies))


def other_precisions(precision: str | None) -> frozenset[DType]:
    """The 16-bit types to which a training's weights are rounded twice,
    if they are saved so.

    ``precision`` is that of the training: one in fp16 may save bf16, which is its fp16
    rounded.
    """
    own_types = {"fp16": DType.F16, "bf16": DType.BF16}
    if precision not in own_types:
        return frozenset()
    return frozenset(own_types.values()) - {own_types[precision]}


@open_files.once()  # every sample is a look at two files
def _compared(weights: Weights, places: int = _PLACES) -> SampleComparison:
    """The first contradiction between weights and their copies, in a sample."""
    from converters import cast  # which needs numpy, and most commands compare nothing

    paths: set[Path] = set()
    for sample in _samples(weights, places):
        if not cast.rounds_to(sample.value, sample.copy):
            return SampleComparison(frozenset(paths), (sample.name, *sample.paths))
        paths.update(sample.paths)

    return SampleComparison(frozenset(paths))


def _samples(weights: Weights, places: int) -> Iterator[_Sample]:
    """Numbers in so many places of each file, all over it."""
    samples = [
        sample
        for name, copy in weights.copies.items()
        if name in weights.tensors
        for sample in _at_each_run(name, weights.tensors[name], copy)
    ]
    totals = Counter(sample.paths[0] for sample in samples)
    passed_counts: Counter[Path] = Counter()
    for sample in samples:
        path = sample.paths[0]
        interval = -(-totals[path] // places)
        if passed_counts[path] % interval == 0:
            yield sample
        passed_counts[path] += 1


def _at_each_run(name: str, value: TensorRef, copy: TensorRef) -> Iterator[_Sample]:
    """Numbers at both ends and in the middle of each run of bytes of a tensor; a run is
    a rank's, as a rule."""
    if value.extents.scattered or copy.extents.scattered or not value.dtype.floating:
        return
    if isinstance(value.extents, Tiled):
        yield from _all_over(name, value, copy)
        return

    start = 0
    for extent in value.extents:
        length = extent.length // value.dtype.itemsize
        count = min(length, _NUMBERS)
        last = length - count
        for offset in sorted({0, last // 2, last}) if count else ():
            yield _Sample.of(name, value, copy, start + offset, count)
        start += length


def _all_over(name: str, value: TensorRef, copy: TensorRef) -> Iterator[_Sample]:
    """Numbers in places all over a tensor of shards, whose rows would be a run each."""
    count = min(value.numel, _NUMBERS)
    last = value.numel - count
    for start in sorted({last * place // _TILED_PLACES for place in range(_TILED_PLACES + 1)}):
        yield _Sample.of(name, value, copy, start, count)
