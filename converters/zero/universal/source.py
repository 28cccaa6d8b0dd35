"""A universal folder as a ``Source``:
the row "deepspeed-universal" of ``converters.detect``.

Each parameter has its files in a folder of its own, so that nothing has to be joined:
the weights are those of ``fp32.pt``, the optimizer's state that of ``exp_avg.pt`` and so
on. What is neither trained (frozen parameters, buffers) nor in the folder ``zero`` whole
comes from the model file, as ``reader`` has it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.detect import filenames
from converters.errors import consistent
from converters.source import SourceTopology
from converters.tensors import TensorRef
from converters.zero.checkpoint import Checkpoint
from converters.zero.param_groups import WEIGHTS
from converters.zero.universal import parameter_folders, reader
from converters.zero.universal.group_layouts import GroupLayout
from converters.zero.universal.reader import Universal

Value = TensorRef | int | float


def read(path: Path, tag: str | None = None, complete: bool = False) -> Checkpoint:
    """The weights, and the optimizer's state by the names of parameters.

    With ``complete`` all states have to be whole; without, they are opened when they are
    asked for. ``CheckpointError`` for what is damaged or incomplete, and where the
    folder does not tell the order of the parameters, by which its files are proven to be
    of one model.
    """
    universal = reader.read(path, tag, states=complete, parallel=True)
    checkpoint = universal.checkpoint
    world_size = checkpoint.world_size * universal.model_ranks
    topology = SourceTopology(world_size, universal.stage)
    return replace(checkpoint, topology=topology, optimizer=partial(state_of, universal))


def state_of(universal: Universal, name: str) -> dict[str, Value]:
    """The optimizer state of a parameter: tensors of its shape, and numbers (``step``).

    ``KeyError`` if the name is not trained.
    """
    folder = universal.checkpoint.place.folder
    with consistent(folder, "a file is damaged or of another conversion; make it again"):
        return _state_of(universal, name)


def _state_of(universal: Universal, name: str) -> dict[str, Value]:
    aliases = universal.checkpoint.weights.aliases
    owner = aliases.get(name, name)
    tied_names = (alias for alias, target in aliases.items() if target == owner)
    same_names = (owner, *tied_names)
    for layout in universal.layouts:
        for layout_name in same_names:
            if layout_name in layout[0]:
                return _state_in(universal.checkpoint.place.folder, layout, layout_name)

    raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")


def _state_in(folder: Path, layout: GroupLayout, name: str) -> dict[str, Value]:
    """The state of a parameter of a param group; what is kept once is the group's."""
    shapes, options, group_state = layout
    inner = folder / filenames.UNIVERSAL
    states = parameter_folders.states_of(inner, name)
    group, _ = parameter_folders.read(inner, states, {name: shapes[name]}, options, group_state)
    tensors = {key: values[name] for key, values in group.values.items() if key != WEIGHTS}
    numbers = {key: parameter_folders.number(node) for key, node in group.constants.items()}
    return {
        **tensors,
        **{key: value for key, value in numbers.items() if isinstance(value, (int, float))},
    }
