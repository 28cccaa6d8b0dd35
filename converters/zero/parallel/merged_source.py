"""Lanes, each with the shards of one tensor-parallel rank, as one ``Source``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from converters.errors import CheckpointError, MalformedError, consistent
from converters.source import Source, SourceTopology
from converters.tensors import TensorRef
from converters.zero.parallel import merged_weights, vocabulary
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.cuts import Cut

Value = TensorRef | int | float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TensorParallelCheckpoint(Source):
    """A checkpoint whose parameters are cut for tensor-parallel ranks, as one model.

    ``lanes`` are what the ranks have, with shards in the place of parameters.
    ``cuts`` says how each is cut, ``original_rows`` how many rows of a padded vocabulary
    are none of its padding.
    """

    lanes: tuple[Source, ...]
    cuts: Mapping[str, Cut]
    original_rows: Mapping[str, int] = field(default_factory=dict)

    def state_of(self, name: str) -> dict[str, Value]:
        """The optimizer's state of a parameter, from the shards of all ranks.

        See ``Source.optimizer``. ``CheckpointError`` if it is not kept for each element.
        """
        owner = self.weights.aliases.get(name, name)
        layout = self.cuts[owner]
        states = [_state(lane, owner) for lane in self.lanes]

        with consistent(self.place.folder, "files of several saves are mixed"):
            keys = {key: None for state in states for key in state}
            return {key: self._merged(owner, layout, key, states) for key in keys}

    def _merged(self, name: str, layout: Cut, key: str, states: list[Mapping[str, Value]]) -> Value:
        values = [state.get(key) for state in states]
        numbers = [value for value in values if value is not None]
        shards = [value if isinstance(value, TensorRef) else None for value in values]
        if not any(shard is not None for shard in shards):
            if any(value != numbers[0] for value in numbers):
                raise MalformedError(f"tensor-parallel ranks have unlike {key} of {name}")
            return numbers[0]

        try:
            return layout.merged(shards)
        except MalformedError as error:
            raise CheckpointError(
                f"{self.place.folder}: the optimizer's {key} of {name} is not kept for each "
                f"element of a shard, so that it cannot be put together ({error})",
                "unsupported",
            ) from error


def _state(lane: Source, owner: str) -> Mapping[str, Value]:
    """What a rank keeps for its shard of a parameter;
    nothing where it has no elements of it."""
    name = lane.weights.aliases.get(owner, owner)
    shard = lane.weights.tensors.get(name)
    has_elements = shard is not None and shard.numel
    return lane.optimizer(name) if lane.optimizer and has_elements else {}


def of_lanes(lanes: Sequence[Source], table: CutTable, kind: str) -> TensorParallelCheckpoint:
    """The model that lanes of one save make up;
    ``table`` says how its parameters are cut.

    ``kind`` is the row of ``converters.detect``. ``CheckpointError`` where shards do not
    fit together, or nothing says how they do.
    """
    first = lanes[0]
    weights, cuts = merged_weights.merged([lane.weights for lane in lanes], table)
    notes = dict.fromkeys(note for lane in lanes for note in lane.notes)
    world_size = sum(lane.world_size for lane in lanes)
    source = TensorParallelCheckpoint(
        kind=kind,
        place=first.place,
        topology=SourceTopology(world_size, first.stage),
        precision=first.precision,
        step=first.step,
        version=first.version,
        files={path: digest for lane in lanes for path, digest in lane.files.items()},
        weights=weights,
        entries=first.entries,
        notes=(f"merged from {len(lanes)} tensor-parallel ranks", *notes),
        without_frozen=first.without_frozen,
        lanes=tuple(lanes),
        cuts=cuts,
        original_rows=vocabulary.original_rows(weights, table),
    )
    return replace(source, optimizer=source.state_of)
