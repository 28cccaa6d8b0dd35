"""MiCS: the files of the first shard group,
whose ranks hold everything, as plain stage 3.

The configuration in them and the number of ranks are those of the whole training; here
they are those of the group.
"""

from __future__ import annotations

from dataclasses import fields

from converters.accessors import is_whole_number
from converters.torch_files import object_graph
from converters.zero import param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.state_files import State
from converters.zero.merging import roots
from converters.zero.merging.checkpoint import MergedCheckpoint, model_paths


def is_of_mics(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was configured with shard groups."""
    size = checkpoint.model.setting("zero_optimization", "mics_shard_size")
    return checkpoint.stage == 3 and is_whole_number(size, 1)


def merged(checkpoint: Checkpoint) -> MergedCheckpoint:
    """The checkpoint as that of a training on the ranks of a shard group."""
    tree = object_graph.read_root(checkpoint.ranks[0].path)
    entries = {
        **roots.of_zero_alone(checkpoint.model.root),
        "dp_world_size": checkpoint.world_size,
    }
    values = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    return MergedCheckpoint(
        **{**values, "model": State(checkpoint.model.file, entries)},
        source=checkpoint,
        groups=tuple(param_groups.read(checkpoint, tree)),
        model_paths=tuple(model_paths(checkpoint)),
    )
