"""Stages of a pipeline as an example, for who says only how many.

Its layers are parted into runs of about as many parameters, each of which trains
something of every param group. A tied module is where its layers are; where a saved
stage has it and none of its layers, the last layer there is taken for the one that uses
it, as a head does. Where DeepSpeed parts the layers no file says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import PP
from converters.words import counted
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.native.stages import stage_layers
from converters.zero.native.stages.stage_layers import StageLayers
from converters.zero.pipeline import stages, tied_modules
from converters.zero.pipeline.stages import PipelineCheckpoint

_COUNT = LazyPattern(r"0*(?P<count>[1-9]\d{0,5})")
_MAX_TRIALS = (
    200_000  # layers times stages: more of them no training has, and an example takes long
)


def count_in(text: str) -> int | None:
    """The number of stages that an option says in the place of their layers, if it does."""
    match = _COUNT.fullmatch(text.strip())
    return int(match["count"]) if match else None


def refusal(
    checkpoint: MergedCheckpoint, source: PipelineCheckpoint, stage_count: int
) -> CheckpointError:
    """The error for a number of several stages, with an example of their layers."""
    folder, option = checkpoint.place.folder, PP(str(stage_count))
    layers = _Layers.of(checkpoint, source)
    if stage_count > len(layers.numbers):
        reason = (
            f"{option} is more than the {counted(len(layers.numbers), 'layer')} that have "
            "parameters; name fewer stages"
        )
        return CheckpointError(f"{folder}: {reason}", "refused")

    remedy = "name them, and the tied modules, as in 0-2+embed,3-+embed"
    example = [layers.stage(first, end) for first, end in layers.even_runs(stage_count)]
    if example and not any(stage_layers.problems(checkpoint, source, example)):
        text = PP(",".join(map(str, example)))
        remedy = f"name them; with about as many parameters in each stage, that is {text}"

    reason = (
        f"{option} does not say which layers each stage has, and no file does: the engine parts "
        "them (partition_method), and prints the layers of each stage when it starts"
    )
    return CheckpointError(f"{folder}: {reason}; {remedy}", "refused")


@dataclass(frozen=True, slots=True)
class _Layers:
    """The layers that have parameters, in their order.

    ``sums`` are the elements before each of them, and in all. ``trained`` counts in the
    same way those of them that train something of a param group, for each group.
    ``tied`` are the layers of each tied module.
    """

    numbers: Sequence[int]
    sums: Sequence[int]
    trained: Sequence[Sequence[int]]
    tied: Mapping[str, Collection[int]]

    @staticmethod
    def of(checkpoint: MergedCheckpoint, source: PipelineCheckpoint) -> _Layers:
        """Those of a pipeline."""
        tied = _tied_layers(source)
        numels: Counter[int] = Counter()
        for name, tensor in checkpoint.weights.tensors.items():
            numels.update(dict.fromkeys(_layers_of(name, tied), tensor.numel))

        numbers = sorted(numels)
        trained = []
        for group in checkpoint.groups:
            members = {layer for name in group.shapes for layer in _layers_of(name, tied)}
            trained.append([0, *accumulate(number in members for number in numbers)])
        sums = [0, *accumulate(numels[number] for number in numbers)]
        return _Layers(numbers, sums, trained, tied)

    def stage(self, first: int, end: int | None) -> StageLayers:
        """A stage of these layers, with the tied modules that one of them is of."""
        stage = StageLayers(first, end)
        keys = [key for key, layers in self.tied.items() if any(map(stage.has, layers))]
        return StageLayers(first, end, tuple(keys))

    def even_runs(self, stage_count: int) -> list[tuple[int, int | None]]:
        """The first layer of each stage, and the one after its last; none where no such
        runs are found that all train something of every param group."""
        count = len(self.numbers)
        if count * stage_count > _MAX_TRIALS:
            return []

        ends = [0]
        for number in range(1, stage_count):
            share = self.sums[-1] * number / stage_count
            possible = [
                end
                for end in range(ends[-1] + 1, count - (stage_count - number) + 1)
                if self._trains_all(ends[-1], end) and self._trains_all(end, count)
            ]
            if not possible:
                return []
            distances = {end: abs(self.sums[end] - share) for end in possible}
            ends.append(min(possible, key=distances.__getitem__))

        firsts = [0, *(self.numbers[end] for end in ends[1:])]
        return list(zip(firsts, [*firsts[1:], None], strict=True))

    def _trains_all(self, first: int, end: int) -> bool:
        return all(counts[end] > counts[first] for counts in self.trained)


def _layers_of(name: str, tied: Mapping[str, Collection[int]]) -> Collection[int]:
    """The layers that a tensor of the whole pipeline is in."""
    key = tied_modules.key_of(name)
    if key is not None:
        return tied.get(key, ())
    number = name.partition(".")[0]
    return (int(number),) if number.isdigit() else ()


def _tied_layers(source: PipelineCheckpoint) -> dict[str, set[int]]:
    """The layers of each tied module, and those that are taken for users of it."""
    layers: dict[str, set[int]] = {}
    for home in source.homes:
        layers.setdefault(home.key, set()).update((home.layer, *home.further_layers))

    previous_last = -1
    for number, stage in enumerate(source.stages):
        names = [name for group in stages.shapes_of(stage) for name in group]
        own_layers = {layer for name in names for layer in _layers_of(name, {})}
        own_layers |= {home.layer for home in source.homes if home.stage == number}
        last = max(own_layers, default=previous_last + 1)

        keys = {tied_modules.key_of(name) for name in names}
        for key in layers:
            if key in keys and not any(previous_last < layer <= last for layer in layers[key]):
                layers[key].add(last)
        previous_last = last
    return layers
