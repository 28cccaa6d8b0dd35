"""Distributed checkpoints of Megatron-Core (torch_dist): DCP with names of its own.

    metadata.json, common.pt    the backend; iteration, arguments
    .metadata, __R_N.distcp     DCP; no keys of a planner
      decoder.layers.mlp.linear_fc1.weight    [layers, ...]: equal layers are stacked
      optimizer.state.exp_avg.decoder...      the optimizer, cut in ways of its own: not read

Stacked layers become one tensor each, ``decoder.layers.3.mlp.linear_fc1.weight``, where
every tensor below ``decoder.layers`` has as many: then their first axis is that of the
layers.

Source: Megatron-Core 0.16 ``dist_checkpointing/strategies/torch.py``,
``transformer/transformer_block.py`` (``sharded_state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from converters.accessors import is_whole_number
from converters.dcp import reader as dcp_reader
from converters.dcp.boxes import LocatedTensor
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.dcp.dcp_state import DcpState
from converters.dcp.keys.layouts import OptimizerLeaves, StateLayout
from converters.dcp.keys.leaves import Leaf
from converters.dcp.saved_state import SavedState
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.storage import bounded_json, open_files, stores
from converters.torch_files import reader as torch_reader
from converters.words import counted, some

MAX_LAYERS = 1 << 12
_BACKEND = "torch_dist"
_STACKED = LazyPattern(r"(?P<prefix>(?:.*\.)?layers)\.(?P<name>[^.\d].*)")
_NOT_MODEL = LazyPattern(r"(?:chained_\d+\.)?optimizer\..*|rng_state.*|rerun_state_machine_state.*")
_NAMES = (
    "the names and the order of rows are Megatron-Core's: Megatron Bridge makes a model of "
    "transformers; the optimizer is not read"
)


class _Layer(NamedTuple):
    """A tensor and the number of a layer in it; ``None`` where it is of no stack."""

    leaf: str
    number: int | None


class UnstackedState:
    """The model's tensors of another state, with one for each layer; see ``SavedState``."""

    def __init__(self, state: DcpState):
        self.state = state
        self.folder = state.folder
        self.world_size = state.world_size
        self.stacked_names: tuple[str, ...] = ()
        self.located: dict[str, LocatedTensor] = {}
        self.layers = self._layers()

    def _layers(self) -> dict[str, _Layer]:
        """Each tensor under its own name."""
        shapes = {
            name: tensor.shape
            for name, tensor in self.state.description.tensors.items()
            if not _NOT_MODEL.fullmatch(name)
        }
        counts: dict[str, set[int]] = {}
        for name, shape in shapes.items():
            if match := _STACKED.fullmatch(name):
                counts.setdefault(match["prefix"], set()).add(shape[0] if shape else 0)

        layers: dict[str, _Layer] = {}
        left_stacked: list[str] = []
        for name, shape in shapes.items():
            match = _STACKED.fullmatch(name)
            if match is None:
                layers[name] = _Layer(name, None)
            elif len(counts[match["prefix"]]) == 1 and 0 < shape[0] <= MAX_LAYERS:
                for index in range(shape[0]):
                    layers[f"{match['prefix']}.{index}.{match['name']}"] = _Layer(name, index)
            else:
                layers[name] = _Layer(name, None)
                left_stacked.append(name)

        self.stacked_names = tuple(left_stacked)
        return layers

    @cached_property
    def leaves(self) -> Sequence[Leaf]:
        """The model's tensors."""
        return [Leaf(name, (name,), True) for name in self.layers]

    def tensor(self, name: str) -> LocatedTensor:
        """A tensor, or that of a layer in a stacked one."""
        leaf, number = self.layers[name]
        if leaf not in self.located:
            self.located[leaf] = self.state.tensor(leaf)
        located = self.located[leaf]
        if number is None or located.tensor is None:
            return located

        shape = located.tensor.shape
        first = (number, *(0 for _ in shape[1:]))
        layer = located.tensor.box(first, (1, *shape[1:])).view(*shape[1:])
        return located._replace(tensor=layer)

    def value(self, name: str) -> Any:
        """There are none."""
        raise KeyError(name)

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The files of some tensors."""
        return self.state.files({self.layers[name].leaf for name in names})


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> ShardedCheckpoint:
    """A folder of Megatron-Core's: the model's weights, in the type that was trained.

    ``tag`` and ``complete`` have no meaning here. ``CheckpointError`` for another
    backend than torch_dist, and for what is damaged or incomplete.
    """
    _require_backend(path)
    unstacked = UnstackedState(DcpState(path))
    state: SavedState = unstacked
    layout = StateLayout({name: name for name in unstacked.layers}, OptimizerLeaves({}, {}), ())
    notes: tuple[str, ...] = (_NAMES,)
    if unstacked.stacked_names:
        names = unstacked.stacked_names
        notes += (f"{counted(len(names), 'tensor')} of several layers each: {some(names)}",)

    source = dcp_reader.assembled(
        "megatron-dist", Place(path, path, path.name), state, layout, None, notes
    )
    return _with_step(source, path / filenames.MEGATRON_COMMON)


def _require_backend(path: Path) -> None:
    """``CheckpointError`` for files that are not DCP's, such as zarr's."""
    try:
        settings = bounded_json.loads(stores.content(path / "metadata.json"))
    except (OSError, ValueError):
        settings = None

    backend = settings.get("sharded_backend") if isinstance(settings, dict) else None
    if backend not in (None, _BACKEND):
        raise CheckpointError(
            f"{path} has tensors in the format {str(backend)[:80]!r} of Megatron-Core, expected "
            f"{_BACKEND}; Megatron Bridge exports it to a model folder",
            "unsupported",
        )


def _with_step(source: ShardedCheckpoint, path: Path) -> ShardedCheckpoint:
    """The same with the iteration that common.pt has."""
    root = torch_reader.read(path).root
    iteration = root.get("iteration") if isinstance(root, dict) else None
    return replace(source, step=iteration if is_whole_number(iteration) else None)
