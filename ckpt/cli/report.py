"""The report of ``ckpt show`` on a checkpoint,
as a result and as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.cli import adapter_facts
from ckpt.cli.results.checkpoints import QuantizedFacts, ShowResult, TensorEntry
from ckpt.text import size
from ckpt.weights import absences, quantized_facts
from ckpt.weights.companions import surroundings
from ckpt.weights.naming import packed
from ckpt.weights.request import Request
from converters.detect.deepspeed import PARALLEL
from converters.detect.kinds import BY_NAME
from converters.lazy_pattern import LazyPattern
from converters.source import EXCLUDED, Source
from converters.storage import misplaced_files, stores
from converters.tensors import Weights
from converters.words import counted, shape, verb

if TYPE_CHECKING:
    from ckpt.runs.checkpoint_folder import RunCheckpoint
    from ckpt.runs.states.status import CheckpointStatus
    from ckpt.weights.opening.unusual import Unusual

_MISSING_FILE = LazyPattern(r"\bhas no ([\w.-]+\w)")
MAX_VALUES = 24  # plain values that are listed


def show(
    source: Source, tensors: bool = False, status: CheckpointStatus | None = None
) -> ShowResult:
    """The facts of a checkpoint, with ``tensors`` those of each tensor.

    ``status`` says how far it can be relied on, where it is a checkpoint of a training.
    """
    surrounding_files = surroundings.of(source.place, Request())
    weights = packed.marked(source.weights, surrounding_files, Request()).weights
    quantized = _quantized(weights)
    adapter = adapter_facts.facts(source, weights)
    unusual_tensors, values = _beside_weights(source)
    stored = [tensor.ref for tensor in unusual_tensors.values()]
    missing = _missing(weights, unusual_tensors, values or {})

    if adapter and quantized:
        base_parameters = adapter.base_parameters + quantized.parameters
        adapter = replace(adapter, base_parameters=base_parameters)

    return ShowResult(
        kind=source.kind,
        path=source.place.folder,
        tag=source.place.tag,
        stage=source.stage,
        world_size=source.world_size,
        precision=source.precision,
        step=status.step if source.step is None and status is not None else source.step,
        deepspeed=source.version,
        parameters=adapter.parameters if adapter else quantized_facts.parameters(weights),
        tensors=len(weights.tensors) + len(unusual_tensors),
        dtypes=_dtypes(weights, unusual_tensors),
        weight_bytes=sum(ref.nbytes for ref in (*weights.tensors.values(), *stored)),
        nbytes=sum(stores.status(path).size for path in source.files),
        file_count=len(source.files),
        buffers=tuple(sorted(weights.buffers)),
        aliases=weights.aliases,
        missing=missing,
        whole=not missing and not source.without_frozen,
        adapter=adapter,
        quantized=quantized,
        tensors_by_name=_tensors_by_name(weights, unusual_tensors) if tensors else None,
        values=values,
        notes=(*source.notes, *_absences_beside(source.place.folder)),
        state=None if status is None else status.state.value,
        reason=None if status is None else _reason(status.description, status.checkpoint),
        **_degrees(source),
    )


def _degrees(source: Source) -> dict[str, Any]:
    """How the files of an engine are split up beside ZeRO, as ``ShowResult`` has it."""
    if source.kind not in PARALLEL:
        return dict.fromkeys(("tensor_ranks", "pipeline_stages", "expert_ranks"))

    from converters.zero.merging import saved_degrees

    degrees = saved_degrees.of_place(source.place)
    return {
        "tensor_ranks": degrees.tensor_ranks,
        "pipeline_stages": degrees.stages,
        "expert_ranks": degrees.expert_ranks,
    }


def _absences_beside(folder: Path) -> Iterator[str]:
    """A line on a dead link or an unfinished download in the folder of weights."""
    if stores.is_folder(folder) and (finding := misplaced_files.missing(folder)):
        yield finding.removeprefix("; ")


def _reason(description: str, checkpoint: RunCheckpoint) -> str | None:
    """A line on the state; of a committed one only where it was changed since."""
    changes = [line for line in (checkpoint.lacks, checkpoint.changes) if line is not None]
    return description or ("; ".join(["committed", *changes]) if changes else None)


def _quantized(weights: Weights) -> QuantizedFacts | None:
    facts = quantized_facts.facts(weights)
    if facts is None:
        return None
    return QuantizedFacts(
        schemes=facts["schemes"],
        weights=facts["weights"],
        missing_weights=facts["absent"],
        constants=facts["constants"],
        parameters=facts["parameters"],
        uncounted_weights=facts["uncounted"],
    )


def _beside_weights(
    source: Source,
) -> tuple[Mapping[str, Unusual], dict[str, str] | None]:
    """Tensors of types that no writer has,
    and plain values: of a file, or a model alone."""
    if source.topology is not None:
        return {}, None

    from ckpt.weights.opening import unusual
    from converters.formats import plain_values

    values = plain_values.of(source.entries)
    return unusual.tensors_of(source), {k: plain_values.line(v) for k, v in values.items()}


def _missing(
    weights: Weights, unusual_tensors: Mapping[str, Unusual], values: Mapping[str, Any]
) -> dict[str, str]:
    """Names that nothing is read of, and why."""
    known_names = unusual_tensors.keys() | values.keys()
    return {name: reason for name, reason in weights.absent.items() if name not in known_names}


def _dtypes(weights: Weights, unusual_tensors: Mapping[str, Unusual]) -> tuple[str, ...]:
    """The element types of all tensors, and words such as sparse."""
    plain_types = {tensor.dtype.value for tensor in weights.tensors.values()}
    return tuple(sorted(plain_types | {tensor.kind for tensor in unusual_tensors.values()}))


def _tensors_by_name(
    weights: Weights, unusual_tensors: Mapping[str, Unusual]
) -> dict[str, TensorEntry]:
    return {
        **{name: TensorEntry(ref.dtype.value, ref.shape) for name, ref in weights.tensors.items()},
        **{
            name: TensorEntry(tensor.kind, tensor.shape) for name, tensor in unusual_tensors.items()
        },
    }


def show_lines(result: ShowResult) -> list[str]:
    """The facts as lines for a reader."""
    is_folder = not stores.is_file(result.path)
    lines = [
        f"kind         {BY_NAME[result.kind].title}",
        f"{'folder' if is_folder else 'file  '}       {result.path}",
        *([f"state        {result.reason or result.state}"] if result.state is not None else []),
        *_training_lines(result),
        *_tensor_lines(result),
        f"on disk      {size(result.nbytes)} in {counted(result.file_count, 'file')}",
    ]

    if result.quantized is not None:
        lines.append(f"quantized    {_quantized_line(result.quantized)}")

    lines += [f"tied         {name} = {owner}" for name, owner in result.aliases.items()]
    lines += _value_lines(result.values or {})
    lines += [f"missing      {line}" for line in missing(result)]
    lines += [f"note         {note}" for note in result.notes]
    for name, entry in (result.tensors_by_name or {}).items():
        lines.append(f"{name}\t{entry.dtype}\t{_shape(entry)}")

    return lines


def _tensor_lines(result: ShowResult) -> list[str]:
    """Lines on the tensors and their bytes; one line for a file of states."""
    bytes_text = f"{size(result.weight_bytes)} in {', '.join(result.dtypes) or 'no tensor'}"
    if BY_NAME[result.kind].of_states:
        return [f"tensors      {f'{result.tensors:,}, {bytes_text}' if result.tensors else 'none'}"]

    heads = adapter_facts.lines(result.adapter) if result.adapter else [_parameters(result)]
    return [*heads, f"weights      {bytes_text}"]


def _value_lines(values: Mapping[str, str]) -> list[str]:
    """The plain values of a file; of many the first."""
    lines = [f"value        {name} = {text}" for name, text in values.items()]
    if len(lines) > MAX_VALUES:
        more = f"value        and {len(lines) - MAX_VALUES:,} more (--json has all)"
        lines[MAX_VALUES:] = [more]
    return lines


def _shape(entry: TensorEntry) -> str:
    return "-" if entry.shape is None else shape(entry.shape)


def _training_lines(result: ShowResult) -> list[str]:
    """The training that saved; of what is not DeepSpeed's only what is known."""
    if result.stage is not None:
        no_partitioning = "" if result.stage else " (no ZeRO partitioning)"
        return [
            f"ZeRO stage   {result.stage}{no_partitioning}",
            f"world size   {result.world_size}{_parallelism(result)}",
            f"trained in   {result.precision}",
            f"step         {_or(result.step)}",
            f"DeepSpeed    {_or(result.deepspeed)}",
        ]

    facts = {
        "world size": result.world_size,
        "trained in": result.precision,
        "step": result.step,
        "saved by": result.deepspeed,
    }
    if result.world_size == 1:
        del facts["world size"]

    return [f"{name:<12} {fact}" for name, fact in facts.items() if fact is not None]


def _parallelism(result: ShowResult) -> str:
    """How many of the ranks share a model, beside those of ZeRO."""
    parts = []
    if (result.tensor_ranks or 1) > 1:
        parts.append(f"{result.tensor_ranks} tensor-parallel ranks")
    if (result.pipeline_stages or 1) > 1:
        parts.append(f"{result.pipeline_stages} pipeline stages")
    if result.expert_ranks:
        counts = " and ".join(map(str, result.expert_ranks))
        parts.append(f"experts on {counts} {verb(result.expert_ranks[-1], 'rank', 'ranks')}")
    return f" ({', '.join(parts)})" if parts else ""


def _parameters(result: ShowResult) -> str:
    buffer_count = len(result.buffers)
    noun = verb(buffer_count, "a buffer", "buffers")
    buffers = f", {buffer_count:,} of them {noun}" if buffer_count else ""
    tensors = counted(result.tensors, "tensor")

    return f"parameters   {result.parameters:,} in {tensors}{buffers}"


def _quantized_line(facts: QuantizedFacts) -> str:
    return quantized_facts.line(
        {
            "schemes": facts.schemes,
            "weights": facts.weights,
            "absent": facts.missing_weights,
            "constants": facts.constants,
            "uncounted": facts.uncounted_weights,
        }
    )


def missing(result: ShowResult) -> list[str]:
    """The parts that a checkpoint lacks;
    that it lacks nothing only where that is known.

    Of an adapter's base nothing is missed.
    """
    lines = absences.lines(result.missing)
    if result.adapter or BY_NAME[result.kind].of_states:
        return lines
    if codes := result.quantized.missing_weights if result.quantized else 0:
        weights = counted(codes, "quantized weight")
        lines.append(f"the codes of {weights}, whose constants are here")

    if EXCLUDED in result.notes:
        lines.append("frozen weights, if there were any")
    if result.state == "incomplete" and not lines:
        match = _MISSING_FILE.search(result.reason or "")
        lines.append(match[1] if match is not None else "see the state")

    return lines or ["nothing"]


def _or(value: Any) -> str:
    return "not recorded" if value is None else str(value)
