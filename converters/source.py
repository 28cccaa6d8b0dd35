"""The ``Source`` that every reader returns,
whatever wrote the files: the waist on the way in.

A reader finds files and locates tensors; whoever converts, opens, shows or publishes
takes a ``Source`` and knows no format. Which reader fits a path says
``converters.detect``. What only one format has (ZeRO's partitions, say) is in a subclass
of that format's room, for the commands that mean that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from converters.tensors import TensorRef, Weights

# the checkpoint's own second record of the weights that are trained
STATES = "model states"
MASTERS = "the fp32 weights of the states, rounded"  # to which 16-bit weights are compared
EXCLUDED = "saved with exclude_frozen_parameters: frozen weights, if any, are not in it"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a checkpoint: its folders and its tag.

    ``root`` holds it and its companions (config.json, tokenizer, if any), ``folder`` has
    its state files, ``tag`` is the name that it goes by in ``root``. Root and folder may
    be the same.
    """

    root: Path
    folder: Path
    tag: str


class SourceTopology(NamedTuple):
    """The ranks that share a training's state, and how ZeRO cuts it.

    ``stage`` is 0 for DeepSpeed without ZeRO, and ``None`` for other trainers.
    """

    world_size: int
    stage: int | None = None


class OptimizerState(Protocol):
    """The states that the optimizer keeps for a parameter,
    located when they are asked for."""

    def __call__(self, name: str, /) -> Mapping[str, TensorRef | int | float]:
        """Tensors of the parameter's shape (``exp_avg``),
        and numbers (``step``), by key.

        ``KeyError`` if ``name`` is not trained; ``CheckpointError`` if the state of it
        cannot be told from that of others.
        """


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Source:
    """A checkpoint, or files of weights, with every tensor located and none read.

    ``kind`` is the name of its row in ``converters.detect.kinds``. ``weights`` have the
    names of the model's state dict. ``files`` maps the files that they and the
    optimizer's state lie in to their digests (``TorchFile.digest``), where a file has
    one. ``optimizer`` is ``None`` where the files hold weights alone, or where a reader
    was asked for weights alone; ``topology`` is ``None`` for files that no training goes
    on from. ``precision`` is what was trained in, ``version`` that of the library that
    saved. ``entries`` is what else the trainer stored, inert where it is not plain data.
    ``notes`` are what a user should know.

    ``record`` is what holds the copies of the weights; ``of_one_save`` says whether
    copies with other values are an error. ``without_frozen`` says that weights may be
    missing that the files do not name, ``knows_ties`` that the files tell which names
    are tied; where they do not, the class of the model does.
    """

    kind: str
    place: Place
    weights: Weights
    files: Mapping[Path, str | None]
    topology: SourceTopology | None = None
    optimizer: OptimizerState | None = field(default=None, compare=False)
    precision: str | None = None
    step: int | None = None
    version: str | None = None
    entries: Mapping[Any, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: str = STATES
    of_one_save: bool = True
    without_frozen: bool = False
    knows_ties: bool = True

    @property
    def stage(self) -> int | None:
        """The ZeRO stage, 0 without ZeRO;
        ``None`` for other trainers and for weights alone."""
        return self.topology.stage if self.topology else None

    @property
    def world_size(self) -> int:
        """The ranks that share the training's state; 1 for weights alone."""
        return self.topology.world_size if self.topology else 1

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        return (
            f"<{type(self).__name__} {str(self.place.folder)!r}: "
            f"{len(self.weights.tensors):,} tensors>"
        )
