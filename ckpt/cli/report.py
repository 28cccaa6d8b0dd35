"""What ``ckpt show`` says of a checkpoint, as a result and as lines for a reader."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt.cli import adapter_facts
from ckpt.cli.results.checkpoints import QuantizedFacts, ShowResult, TensorEntry
from ckpt.text import size
from ckpt.weights import absences, quantized_facts
from ckpt.weights.companions import surroundings
from ckpt.weights.naming import packed
from ckpt.weights.request import Request
from converters.detect.kinds import BY_NAME
from converters.source import EXCLUDED, Source
from converters.storage import stores
from converters.tensors import Weights
from converters.words import counted, shape, verb

if TYPE_CHECKING:
    from ckpt.runs.states.status import CheckpointStatus


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
        step=source.step,
        deepspeed=source.version,
        parameters=adapter.parameters if adapter else quantized_facts.parameters(weights),
        tensors=len(weights.tensors),
        dtypes=tuple(sorted({tensor.dtype.value for tensor in weights.tensors.values()})),
        weight_bytes=sum(tensor.nbytes for tensor in weights.tensors.values()),
        nbytes=sum(stores.status(path).size for path in source.files),
        file_count=len(source.files),
        buffers=tuple(sorted(weights.buffers)),
        aliases=weights.aliases,
        missing=weights.absent,
        whole=not weights.absent and not source.without_frozen,
        adapter=adapter,
        quantized=quantized,
        tensors_by_name=_tensors_by_name(weights) if tensors else None,
        notes=tuple(source.notes),
        state=None if status is None else status.state.value,
        reason=None if status is None else status.description or None,
    )


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


def _tensors_by_name(weights: Weights) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(tensor.dtype.value, tensor.shape)
        for name, tensor in weights.tensors.items()
    }


def show_text(result: ShowResult) -> str:
    """The facts as text for a reader."""
    lines = [
        f"kind         {BY_NAME[result.kind].title}",
        f"folder       {result.path}",
        *([f"state        {result.reason or result.state}"] if result.state is not None else []),
        *_training_lines(result),
        *(adapter_facts.lines(result.adapter) if result.adapter else [_parameters(result)]),
        f"weights      {size(result.weight_bytes)} in {', '.join(result.dtypes)}",
        f"on disk      {size(result.nbytes)} in {counted(result.file_count, 'file')}",
    ]

    if result.quantized is not None:
        lines.append(f"quantized    {_quantized_line(result.quantized)}")

    lines += [f"tied         {name} = {owner}" for name, owner in result.aliases.items()]
    lines += [f"missing      {line}" for line in missing(result)]
    lines += [f"note         {note}" for note in result.notes]
    for name, entry in (result.tensors_by_name or {}).items():
        lines.append(f"{name}\t{entry.dtype}\t{shape(entry.shape)}")

    return "\n".join(lines)


def _training_lines(result: ShowResult) -> list[str]:
    """The training that saved; of what is not DeepSpeed's only what is known."""
    if result.stage is not None:
        no_partitioning = "" if result.stage else " (no ZeRO partitioning)"
        return [
            f"ZeRO stage   {result.stage}{no_partitioning}",
            f"world size   {result.world_size}",
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
    """What a checkpoint lacks; that it lacks nothing only where that is known.

    Of an adapter's base nothing is missed.
    """
    lines = absences.lines(result.missing)
    if result.adapter:
        return lines
    if codes := result.quantized.missing_weights if result.quantized else 0:
        weights = counted(codes, "quantized weight")
        lines.append(f"the codes of {weights}, whose constants are here")

    if EXCLUDED in result.notes:
        lines.append("frozen weights, if there were any")

    return lines or ["nothing"]


def _or(value: Any) -> str:
    return "not recorded" if value is None else str(value)
