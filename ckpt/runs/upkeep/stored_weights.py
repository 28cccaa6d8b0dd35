"""Whether weights beside DeepSpeed's files have the values of its states,
for ``verify --data``.

A trainer saves ``model.safetensors`` or an adapter beside the files that a training goes
on from. No checksum of either tells that both are of one step. Their values do: the
weights are the fp32 ones of the states, rounded. What the states do not have under its
name is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.runs import engines
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.states.verification import Verdict
from ckpt.text import size
from converters import detect
from converters.detect.deepspeed import EXPERTS, NATIVE, UNIVERSAL
from converters.detect.filenames import ADAPTER
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.source import Source
from converters.tensors import TensorRef
from converters.words import counted
from converters.zero.files.discovery import is_tag_folder

if TYPE_CHECKING:
    from ckpt.runs.upkeep.kept_values import Counterpart

_REMEDY = (
    "the weights are of another step, or were changed since; ckpt to-fp32 makes weights of the "
    "states"
)


_EXPERTS_OF_ONE_RANK = (
    "a trainer wrote the experts that its first rank has; ckpt to-fp32 makes weights of the states"
)


@dataclass(frozen=True, slots=True)
class WeightsComparison:
    """The weights in the file ``name``, and the states that they are compared with.

    ``stored`` has all tensors of the file, of which some may have no counterpart. ``fault``
    says of which tensor of experts a part is stored, if of any.
    """

    name: str
    source: Source
    pairs: tuple[Counterpart, ...]
    stored: Mapping[str, TensorRef]
    fault: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are compared."""
        return sum(pair.stored.nbytes for pair in self.pairs if pair.stored is not None)


def plans(verdict: Verdict) -> list[WeightsComparison]:
    """The tensors of a whole checkpoint that are compared, for each engine; none where
    that cannot be.

    Of a sample nothing but where the weights are: ``execute`` draws one.
    """
    folder = verdict.status.checkpoint.folder
    is_asked = verdict.whole and verdict.depth.word != "structure"
    has_states = verdict.status.tag is not None or verdict.status.checkpoint.is_universal
    if not is_asked or not has_states or is_tag_folder(folder):
        return []

    manifest = verdict.status.checkpoint.manifest
    tags: Mapping[str, str | None] = {"": verdict.status.tag}
    if manifest is not None:
        tags = engines.tags(manifest)
    comparisons = []
    for engine, tag in tags.items():
        try:
            comparison = plan(folder, engine, tag)
        except CheckpointError:
            continue  # of a form that is not compared
        if comparison is not None:
            comparisons.append(comparison)

    return comparisons


def plan(folder: Path, engine: str, tag: str | None) -> WeightsComparison | None:
    """The tensors that the states and the weights in an engine's folder have in common.

    ``None`` without such weights; ``CheckpointError`` for what is of a form that is not
    compared.
    """
    model_folder = folder / engine
    is_adapter = (model_folder / ADAPTER).is_file()
    if is_adapter:
        stored = safetensors.read(model_folder / ADAPTER).tensors
        name = ADAPTER
    else:
        from converters.formats import gathered_16bit

        beside = next(gathered_16bit.candidates(model_folder), None)
        if beside is None:
            return None
        stored, name = beside.tensors, beside.name

    source = detect.read(folder, tag, complete=True)
    if source.kind not in (*NATIVE, UNIVERSAL):
        return None

    from ckpt.runs.upkeep import kept_weights

    pairs = kept_weights.counterparts(source, stored, model_folder if is_adapter else None)
    common_pairs = [pair for pair in pairs if pair.fault is None and pair.copies is not None]
    faults = [pair.fault for pair in pairs if pair.stored is not None and pair.fault is not None]
    fault = next(iter(faults), None) if source.kind == EXPERTS else None
    return WeightsComparison(name, source, tuple(common_pairs), stored, fault)


def execute(
    verdict: Verdict, comparisons: Sequence[WeightsComparison], progress: Progress = quiet
) -> Verdict:
    """The verdict with what the values say."""
    problems, proven = list(verdict.problems), list(verdict.proven)
    folder = verdict.status.checkpoint.folder
    for comparison in comparisons:
        try:
            line = compare(comparison, verdict.depth.word == "sample", progress)
        except CheckpointError as error:
            problems.append(str(error).replace(f"{folder}/", ""))
        else:
            proven += [] if line is None else [line]

    return replace(verdict, problems=tuple(problems), proven=tuple(proven))


def compare(
    comparison: WeightsComparison, in_sample: bool, progress: Progress = quiet
) -> str | None:
    """A line on the values that agree,
    if any were compared; ``CheckpointError`` for others."""
    source, name = comparison.source, comparison.name
    if comparison.fault is not None:
        raise CheckpointError(f"{name}: {comparison.fault}: {_EXPERTS_OF_ONE_RANK}")
    if not in_sample:
        from ckpt.runs.upkeep import kept_values

        if comparison.pairs:
            checksums = source.weights.checksums
            kept_values.require_same(comparison.pairs, checksums, _REMEDY, progress)
        return _line_on_values(comparison)

    from ckpt.runs.foreign import value_samples
    from ckpt.weights.companions import surroundings
    from ckpt.weights.layouts import stored_copies
    from ckpt.weights.reader.audience import Audience

    audience = Audience(source.place.root, surroundings.config_of(source.place))
    sample = value_samples.compare_beside(
        source, lambda weights: stored_copies.attached(weights, audience)[0]
    )
    if sample.contradiction is not None:
        tensor_name, _, copy_path = sample.contradiction
        raise CheckpointError(
            f"{copy_path} holds other values of {tensor_name} than the states: {_REMEDY}"
        )

    return f"sampled values in {name} are those of the states" if sample.paths else None


def _line_on_values(comparison: WeightsComparison) -> str:
    """How many tensors have the values of the states, and how much was not compared."""
    name, pairs = comparison.name, comparison.pairs
    if not pairs:
        return (
            f"the values in {name} were not compared with the states, which have its tensors under "
            "other names or in another form"
        )

    compared_refs = [pair.stored for pair in pairs if pair.stored is not None]
    uncompared_bytes = _bytes_of(comparison.stored.values()) - _bytes_of(compared_refs)
    # one tensor of a running model may be several of the file
    number = len(pairs) if uncompared_bytes else len(comparison.stored)
    line = f"the values of {counted(number, 'tensor')} in {name} are those of the states"
    if not uncompared_bytes:
        return line
    return f"{line}; {size(uncompared_bytes)} more have no counterpart there and were not compared"


def _bytes_of(tensors: Iterable[TensorRef]) -> int:
    """Bytes of tensors in files, those of tied ones once."""
    extents = sorted(
        (str(extent.path), extent.offset, extent.offset + extent.length)
        for tensor in tensors
        for extent in tensor.extents
    )
    nbytes, last_path, last_end = 0, "", 0
    for path, start, end in extents:
        start = start if path != last_path else max(start, last_end)
        nbytes += max(0, end - start)
        last_end = end if path != last_path else max(end, last_end)
        last_path = path

    return nbytes
