"""The parts of a checkpoint of FSDP or DCP beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.source import Source

if TYPE_CHECKING:
    from converters.dcp.boxes import LocatedTensor


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike: their names in its order, and its
    hyperparameters, such as ``lr``; tensors of these as numbers."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ShardedCheckpoint(Source):
    """A checkpoint that FSDP, DDP or a plain training saved in pieces.

    ``groups`` reads the optimizer's groups when it is called; ``None`` where no
    optimizer was saved, or its states have numbers instead of names. ``located_states``
    has every tensor that the optimizer keeps for a parameter, numbers too, and the
    records that it lies in.
    """

    groups: Callable[[], tuple[ParameterGroup, ...]] | None = field(default=None, compare=False)
    located_states: Callable[[str], Mapping[str, LocatedTensor]] | None = field(
        default=None, compare=False
    )
