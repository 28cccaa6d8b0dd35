"""A checkpoint of tensor parallelism as a ``Source``: the row "deepspeed-model-parallel"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.detect.deepspeed import TENSOR_PARALLEL
from converters.errors import CheckpointError, MalformedError, consistent, readable
from converters.source import Place, Source, SourceTopology
from converters.storage import open_files
from converters.tensors import TensorRef
from converters.zero import optimizer_state
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import discovery, several_models
from converters.zero.parallel import lanes, merged_weights, rules, vocabulary
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.cuts import Cut

Value = TensorRef | int | float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TensorParallelCheckpoint(Source):
    """A checkpoint whose parameters are cut for tensor-parallel ranks, as one model.

    ``lanes`` are the checkpoints of the ranks, with shards in the place of parameters.
    ``cuts`` says how each is cut, ``original_rows`` how many rows of a padded vocabulary
    are none of its padding.
    """

    lanes: tuple[Checkpoint, ...]
    cuts: Mapping[str, Cut]
    original_rows: Mapping[str, int] = field(default_factory=dict)

    def state_of(self, name: str) -> dict[str, Value]:
        """The optimizer's state of a parameter, from the shards of all ranks.

        See ``Source.optimizer``. ``CheckpointError`` if it is not kept for each element.
        """
        owner = self.weights.aliases.get(name, name)
        layout = self.cuts[owner]
        states: list[Mapping[str, Value]] = []
        for lane in self.lanes:
            own_name = lane.weights.aliases.get(owner, owner)
            shard = lane.weights.tensors.get(own_name)
            has_elements = shard is not None and shard.numel
            states.append(optimizer_state.read(lane, own_name) if has_elements else {})

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


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> TensorParallelCheckpoint:
    """Locates every tensor of all ranks' files, and says how the shards fit together.

    With ``complete`` everything that a training goes on from has to be there.
    """
    place = discovery.find(path, tag) if complete else several_models.find(path, tag)
    with readable(place.folder, "a file is damaged or of another save"):
        return _read(place, complete)


def _read(place: Place, require_all: bool) -> TensorParallelCheckpoint:
    of_ranks = lanes.read(place, require_all)
    first = of_ranks[0]
    table = CutTable.of(first.model, len(of_ranks), rules.current())
    weights, cuts = merged_weights.merged([lane.weights for lane in of_ranks], table)

    notes = dict.fromkeys(note for lane in of_ranks for note in lane.notes)
    source = TensorParallelCheckpoint(
        kind=TENSOR_PARALLEL,
        place=place,
        topology=SourceTopology(first.world_size * len(of_ranks), first.stage),
        precision=first.precision,
        step=first.step,
        version=first.version,
        files={path: digest for lane in of_ranks for path, digest in lane.files.items()},
        weights=weights,
        entries=first.entries,
        notes=(f"merged from {len(of_ranks)} tensor-parallel ranks", *notes),
        without_frozen=first.without_frozen,
        lanes=of_ranks,
        cuts=cuts,
        original_rows=vocabulary.original_rows(weights, table),
    )
    return replace(source, optimizer=source.state_of)
