"""The stages of a pipeline as one model: each has the names of its own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters import words
from converters.detect.deepspeed import EXPERTS
from converters.errors import CheckpointError
from converters.source import Source, SourceTopology
from converters.tensors import TensorRef, Weights
from converters.zero.pipeline import tied_modules


@dataclass(frozen=True, slots=True)
class StageStates:
    """The optimizer's states of all stages; ``stages`` are by the names that each has."""

    stages: Mapping[str, Source]

    def of(self, name: str) -> Mapping[str, TensorRef | int | float]:
        """The state of a parameter; see ``Source.optimizer``."""
        stage = self.stages.get(name)
        if stage is None or stage.optimizer is None:
            raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")
        return stage.optimizer(name)


def joined(stages: Sequence[Source]) -> Source:
    """All stages as one source; of a tied module the first stage's copy is the model's.

    ``CheckpointError`` where two stages have a name that is of no tied module.
    """
    first = stages[0]
    if len(stages) == 1:
        return first

    owners: dict[str, Source] = {}
    for stage in stages:
        for name in stage.weights.order:
            if name in owners and tied_modules.key_of(name) is None:
                raise CheckpointError(
                    f"{first.place.folder} has {name} in two stages; files of two saves are mixed"
                )
            owners.setdefault(name, stage)

    later_copies = [
        stage for stage in stages[1:] if any(owners[n] is not stage for n in stage.weights.order)
    ]
    notes = dict.fromkeys(note for stage in stages for note in stage.notes)
    if later_copies:
        keys = {key for name in owners if (key := tied_modules.key_of(name)) is not None}
        notes[
            f"several stages have a copy of the tied module {words.some(sorted(keys))}; written is "
            "that of the first one"
        ] = None

    return Source(
        kind=EXPERTS,
        place=first.place,
        topology=SourceTopology(sum(stage.world_size for stage in stages), first.stage),
        optimizer=StageStates(owners).of,
        precision=first.precision,
        step=first.step,
        version=first.version,
        files={path: digest for stage in stages for path, digest in stage.files.items()},
        weights=_weights(stages, owners),
        entries=first.entries,
        notes=tuple(notes),
        without_frozen=any(stage.without_frozen for stage in stages),
    )


def _weights(stages: Sequence[Source], owners: Mapping[str, Source]) -> Weights:
    """The weights that each stage is the first to have."""

    def values_of(of: Callable[[Weights], Mapping[str, Any]]) -> dict[str, Any]:
        return {
            name: value
            for stage in stages
            for name, value in of(stage.weights).items()
            if owners.get(name) is stage
        }

    def names_of(of: Callable[[Weights], Iterable[str]]) -> frozenset[str]:
        return frozenset(
            name for stage in stages for name in of(stage.weights) if owners.get(name) is stage
        )

    checksums = {
        (checksum.extent.path, checksum.extent.offset): checksum
        for stage in stages
        for checksum in stage.weights.checksums
    }
    return Weights(
        values_of(lambda weights: weights.tensors),
        values_of(lambda weights: weights.aliases),
        names_of(lambda weights: weights.buffers),
        values_of(lambda weights: weights.absent),
        values_of(lambda weights: weights.copies),
        tuple(checksums[key] for key in sorted(checksums)),
        tuple(owners),
        names_of(lambda weights: weights.frozen),
        names_of(lambda weights: weights.packed),
        names_of(lambda weights: weights.trained),
        values_of(lambda weights: weights.lost_ties),
    )
