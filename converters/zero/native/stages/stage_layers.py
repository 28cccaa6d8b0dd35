"""The layers of each stage of a pipeline, as a user or an engine says them.

    0-2+embed,3-+embed     two stages: layers 0 to 2, and layers 3 to the last; both have
                           the tied module "embed"

Nothing in the files of a pipeline says where DeepSpeed will part the layers of another
number of stages (``partition_method``), or which of them use a tied module: a use with a
``forward_fn`` has no layer file. Source: DeepSpeed 0.19.8 ``runtime/pipe/module.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters import words
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import PP
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.pipeline import tied_modules
from converters.zero.pipeline.stages import PipelineCheckpoint

_STAGE = LazyPattern(r"(?P<first>\d{1,6})-(?P<last>\d{1,6})?(?P<tied>(?:\+[^+,\s]+)*)")


@dataclass(frozen=True, slots=True)
class StageLayers:
    """The layers of a stage, from ``first`` to before ``end`` (``None``: to the last one),
    and the keys of the tied modules that it has, in their order."""

    first: int
    end: int | None
    tied: tuple[str, ...] = ()

    def has(self, layer: int) -> bool:
        """Whether a layer is in it."""
        return self.first <= layer and (self.end is None or layer < self.end)

    def has_parameter(self, name: str) -> bool:
        """Whether a tensor of the whole pipeline is in it."""
        key = tied_modules.key_of(name)
        if key is not None:
            return key in self.tied
        number = name.partition(".")[0]
        return number.isdigit() and self.has(int(number))

    def __str__(self) -> str:
        """As the option has it."""
        last = "" if self.end is None else str(self.end - 1)
        return "+".join([f"{self.first}-{last}", *self.tied])


def parse(text: str) -> tuple[StageLayers, ...]:
    """The stages that an option says; ``CheckpointError`` where they are none."""
    stages = tuple(_stage(text, part) for part in text.split(","))
    ends = [0, *(stage.end for stage in stages)]
    are_in_order = all(
        stage.first == end and (stage.end is None or stage.end > stage.first)
        for stage, end in zip(stages, ends[: len(stages)], strict=True)
    )
    if not are_in_order:
        raise _unreadable(text, "each stage begins after the last layer of the one before")
    return stages


def _stage(text: str, part: str) -> StageLayers:
    match = _STAGE.fullmatch(part.strip())
    if match is None:
        raise _unreadable(text, f"{part.strip()!r} is no stage")
    last = match["last"]
    keys = tuple(filter(None, match["tied"].split("+")))
    return StageLayers(int(match["first"]), None if last is None else int(last) + 1, keys)


def _unreadable(text: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{PP(text)}: {reason}; name the layers of each stage and the tied modules in it, as in "
        "0-2+embed,3-+embed, or the number of stages, for an example",
        "refused",
    )


def for_checkpoint(
    checkpoint: MergedCheckpoint, source: PipelineCheckpoint, stages: Sequence[StageLayers]
) -> tuple[StageLayers, ...]:
    """The stages for a pipeline, whose tied modules are all in a stage if there is one.

    ``CheckpointError`` where they do not have every layer and every tied module, or a
    stage would train nothing of a param group.
    """
    if len(stages) == 1 and not stages[0].tied:
        stages = (StageLayers(stages[0].first, stages[0].end, tied_keys(source)),)

    for problem in problems(checkpoint, source, stages):
        raise CheckpointError(
            f"{checkpoint.place.folder}: {problem}; DeepSpeed prints the layers of each stage when "
            f"the engine starts: name them with {PP}, and the tied modules after a + in each stage "
            "that uses them",
            "refused",
        )
    return tuple(stages)


def for_experts(
    checkpoint: ExpertsCheckpoint, stages: Sequence[StageLayers]
) -> tuple[StageLayers, ...]:
    """The stages for a pipeline with experts; ``CheckpointError`` where none are said, they
    do not have every tensor, or one would train nothing of a param group.

    Such a pipeline has no layer files, which would say the layers of tied modules.
    """
    keys = {tied_modules.key_of(name) for name in checkpoint.weights.order}
    lacks = [f"no tied module is called {k}" for s in stages for k in s.tied if k not in keys]
    lacks += problems_of_names(checkpoint, stages) if stages else ["no layers are said"]
    for problem in lacks:
        raise CheckpointError(
            f"{checkpoint.place.folder}: {problem}; name the layers of each stage with {PP}, each "
            "with experts, and the tied modules after a + in each stage that uses them, as in "
            "0-2+embed,3-+embed (DeepSpeed prints the layers of each stage when the engine starts)",
            "refused",
        )
    return tuple(stages)


def tied_keys(source: PipelineCheckpoint) -> tuple[str, ...]:
    """The keys of the tied modules of a pipeline, in their order."""
    return tuple(dict.fromkeys(home.key for home in source.homes))


def problems(
    checkpoint: MergedCheckpoint, source: PipelineCheckpoint, stages: Sequence[StageLayers]
) -> Iterator[str]:
    """What the stages lack."""
    keys = tied_keys(source)
    for stage in stages:
        unknown_keys = [key for key in stage.tied if key not in keys]
        if unknown_keys:
            yield (
                f"no tied module is called {unknown_keys[0]}, which the stage {stage} has; there "
                f"{'are ' + words.some(keys) if keys else 'is none'}"
            )

    for home in source.homes:
        for layer in (home.layer, *home.further_layers):
            if not any(stage.has(layer) and home.key in stage.tied for stage in stages):
                yield f"layer {layer} is of the tied module {home.key}, and no stage has both"

    yield from problems_of_names(checkpoint, stages)


def problems_of_names(checkpoint: MergedCheckpoint, stages: Sequence[StageLayers]) -> Iterator[str]:
    """What the stages lack of the tensors and of the param groups."""
    for name in checkpoint.weights.order:
        if not any(stage.has_parameter(name) for stage in stages):
            yield f"no stage has {name}"

    for number, stage in enumerate(stages):
        for index, group in enumerate(checkpoint.groups):
            if not any(map(stage.has_parameter, group.shapes)):
                yield f"stage {number} ({stage}) trains nothing of param group {index}"
