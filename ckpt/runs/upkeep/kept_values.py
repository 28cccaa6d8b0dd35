"""Whether weights hold the values of the states: every element, compared.

    masters, fp32  --read, CRC32 checked-->  rounded to the type of the weights  ==  the weights

So weights of another step, or damaged before their digests were made, are never kept in
the place of the states. Memory is that of the threads that move a shard, whatever the
model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckpt.runs.digests import Progress, quiet
from converters import words
from converters.computing.computed import Computed
from converters.execute import shards
from converters.execute.workers import Mover
from converters.names.selection import proving
from converters.plan import Placement, Plan, Shard
from converters.storage.checksums import Ledger
from converters.tensors import Checksum, TensorRef

_NAME = "states"
_LARGE = 64 << 20  # bytes of states from which on several threads are worth their start


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A tensor of the states, and the one among the weights that has its values.

    ``stored`` is ``None`` where the weights have none, ``state`` where no file of the
    states holds the values. ``in_other_form`` is what a library computes from the state
    before it stores it, so that shape and values may differ.
    """

    name: str
    state: TensorRef | None
    stored: TensorRef | None
    in_other_form: bool = False

    @property
    def fault(self) -> str | None:
        """Why the weights are not complete, as far as names and shapes tell."""
        if self.stored is None:
            return f"{self.name} is missing"
        if self.state is None or self.in_other_form or self.stored.shape == self.state.shape:
            return None

        shapes = [words.shape(tensor.shape) for tensor in (self.stored, self.state)]
        return f"{self.name} is {shapes[0]}, expected {shapes[1]}"

    @property
    def copies(self) -> tuple[TensorRef, TensorRef] | None:
        """The state and what is stored, where values can be compared: one type is the
        other, rounded, or both are one."""
        state, stored = self.state, self.stored
        if state is None or stored is None or self.in_other_form or isinstance(state, Computed):
            return None

        both_round = state.dtype.floating and stored.dtype.floating
        return (state, stored) if both_round or state.dtype is stored.dtype else None


def require_same(
    counterparts: Sequence[Counterpart],
    checksums: Iterable[Checksum],
    remedy: str,
    progress: Progress = quiet,
) -> int:
    """How many tensors were compared, all of them equal; reads them and their states.

    ``checksums`` are those of the states. ``progress`` gets the bytes of the weights.
    ``CheckpointError`` for other values, with ``remedy``, and for damaged states.
    """
    pairs = [
        (counterpart.name, *counterpart.copies)
        for counterpart in counterparts
        if counterpart.copies is not None
    ]
    shard = _shard(pairs)
    states = [state for _, state, _ in pairs]
    plan = Plan((shard,), None, shard.nbytes, checksums=proving(states, checksums))
    share = sum(stored.nbytes for _, _, stored in pairs) / max(shard.nbytes, 1)

    def advance(nbytes: int) -> None:
        progress(int(nbytes * share))

    mover = Mover(True, Ledger(), set(), advance)
    mover.move(shard, _Nowhere(), workers=1 if shard.nbytes < _LARGE else None)
    if mover.mismatched:
        raise shards.unlike_error(plan, shard, mover.ledger, min(mover.mismatched), remedy)

    shards.MoveReport().prove(plan, mover.ledger, mover.mismatched)

    return len(pairs)


class _Nowhere:
    """Takes the bytes that were compared, and keeps none; see ``store.Writer``."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Nothing."""


def _shard(pairs: Sequence[tuple[str, TensorRef, TensorRef]]) -> Shard:
    """The states one after the other, as they are; the weights are their copies."""
    placements = []
    nbytes = 0
    for name, state, stored in pairs:
        placements.append(Placement(name, state, state.dtype, nbytes, stored))
        nbytes += state.nbytes

    return Shard(_NAME, nbytes, (), tuple(placements))
