"""Stages of a pipeline as examples, for who says only how many.

No file says how DeepSpeed will part the layers, so the answer is what each of its methods
gives that can have parted the saved stages; where none can, runs of about as many
parameters, each of which trains something of every param group. A tied module is where its
layers are. A saved stage that has it and none of its layers has one without a file: as a
head behind the last layer, or else the last layer there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import PP
from converters.words import counted
from converters.zero.files.state_files import Shape
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.native.stages import partition_methods, stage_layers
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
    checkpoint: MergedCheckpoint,
    source: PipelineCheckpoint,
    stage_count: int,
    shapes: Mapping[str, Shape],
) -> CheckpointError:
    """The error for a number of several stages, with examples of their layers.

    ``shapes`` are what a tensor-parallel rank will have of the parameters.
    """
    folder, option = checkpoint.place.folder, PP(str(stage_count))
    layers = _Layers.of(checkpoint, source, shapes)
    if stage_count > len(layers.numbers):
        reason = (
            f"{option} is more than the {counted(len(layers.numbers), 'layer')} that have "
            "parameters; name fewer stages"
        )
        return CheckpointError(f"{folder}: {reason}", "refused")

    examples = [
        f"{names} gives {PP(','.join(map(str, stages)))}"
        for stages, names in _by_method(layers, stage_count)
        if not any(stage_layers.problems(checkpoint, source, stages))
    ]
    remedy = "name them, and the tied modules, as in 0-2+embed,3-+embed"
    even_stages = [layers.stage(first, end) for first, end in layers.even_runs(stage_count)]
    if examples:
        remedy = f"name them; DeepSpeed's partition_method {', '.join(examples)}"
    elif even_stages and not any(stage_layers.problems(checkpoint, source, even_stages)):
        text = PP(",".join(map(str, even_stages)))
        remedy = f"name them; with about as many parameters in each stage, that is {text}"

    reason = (
        f"{option} does not say which layers each stage has, and no file does: the engine parts "
        "them (partition_method), and prints the layers of each stage when it starts"
    )
    return CheckpointError(f"{folder}: {reason}; {remedy}", "refused")


def _by_method(layers: _Layers, stage_count: int) -> Iterator[tuple[list[StageLayers], str]]:
    """The stages that each method gives which can have parted the saved ones, and its name;
    once where several give the same."""
    saved_bounds = layers.bounds_by_method(len(layers.saved))
    names_by_bounds: dict[tuple[int, ...], list[str]] = {}
    for method, bounds in layers.bounds_by_method(stage_count).items():
        if method in saved_bounds and layers.are_saved_in(saved_bounds[method]):
            names_by_bounds.setdefault(tuple(bounds), []).append(f'"{method}"')

    for parted, names in names_by_bounds.items():
        ends: list[int | None] = [*parted[1:-1], None]
        stages = [layers.stage(first, end) for first, end in zip(parted[:-1], ends, strict=True)]
        yield stages, " and ".join(names)


@dataclass(frozen=True, slots=True)
class _Layers:
    """The layers that train something, in their order.

    ``numels`` are the elements that each of them trains on a rank, ``sums`` those before
    each of them, and in all. ``trained`` counts in the same way the layers that train
    something of a param group, for each group. ``tied`` are the layers of each tied
    module, ``saved`` those of each saved stage.
    """

    numels: Mapping[int, int]
    sums: Sequence[int]
    trained: Sequence[Sequence[int]]
    tied: Mapping[str, Collection[int]]
    saved: Sequence[Collection[int]]

    @staticmethod
    def of(
        checkpoint: MergedCheckpoint, source: PipelineCheckpoint, shapes: Mapping[str, Shape]
    ) -> _Layers:
        """Those of a pipeline."""
        saved = _saved_layers(source)
        tied = _tied_layers(source, saved)
        numels: Counter[int] = Counter()
        for group in checkpoint.groups:
            for name in group.shapes:
                numels.update(dict.fromkeys(_layers_of(name, tied), prod(shapes[name])))

        numbers = sorted(numels)
        trained = []
        for group in checkpoint.groups:
            members = {layer for name in group.shapes for layer in _layers_of(name, tied)}
            trained.append([0, *accumulate(number in members for number in numbers)])
        sums = [0, *accumulate(numels[number] for number in numbers)]
        return _Layers({n: numels[n] for n in numbers}, sums, trained, tied, saved)

    @property
    def numbers(self) -> Sequence[int]:
        """The layers that train something."""
        return list(self.numels)

    def bounds_by_method(self, stage_count: int) -> Mapping[str, list[int]]:
        """What DeepSpeed's methods make of all layers up to the last that is known."""
        last = max(self.numbers, default=-1)
        numels = [self.numels.get(layer, 0) for layer in range(last + 1)]
        return partition_methods.bounds_by_method(numels, stage_count)

    def are_saved_in(self, bounds: Sequence[int]) -> bool:
        """Whether each saved stage has no layers beyond these bounds."""
        return all(
            first <= layer < end
            for layers, (first, end) in zip(self.saved, pairwise(bounds), strict=True)
            for layer in layers
        )

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

        numbers = self.numbers
        firsts = [0, *(numbers[end] for end in ends[1:])]
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


def _saved_layers(source: PipelineCheckpoint) -> list[set[int]]:
    """The layers that each saved stage is known to have."""
    saved = []
    for number, stage in enumerate(source.stages):
        names = [name for group in stages.shapes_of(stage) for name in group]
        layers = {layer for name in names for layer in _layers_of(name, {})}
        saved.append(layers | {home.layer for home in source.homes if home.stage == number})
    return saved


def _tied_layers(
    source: PipelineCheckpoint, saved: Sequence[Collection[int]]
) -> dict[str, set[int]]:
    """The layers of each tied module, and those that are taken for users of it."""
    layers: dict[str, set[int]] = {}
    for home in source.homes:
        layers.setdefault(home.key, set()).update((home.layer, *home.further_layers))

    previous_last = -1
    for number, stage in enumerate(source.stages):
        last = max(saved[number], default=previous_last + 1)
        if number == len(source.stages) - 1:
            last = max(last, *source.layers) + 1
        names = [name for group in stages.shapes_of(stage) for name in group]
        keys = {tied_modules.key_of(name) for name in names}
        for key in layers:
            if key in keys and not any(previous_last < layer <= last for layer in layers[key]):
                layers[key].add(last)
        previous_last = last
    return layers
