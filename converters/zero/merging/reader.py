"""The checkpoint at a path, as ZeRO alone would have saved it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from converters.accessors import is_whole_number
from converters.detect import detect
from converters.detect.deepspeed import EXPERTS, PIPELINE, TENSOR_PARALLEL
from converters.errors import readable
from converters.storage import open_files
from converters.storage.store import Name
from converters.storage.stores import source_path
from converters.torch_files import object_graph
from converters.zero import checkpoint as zero
from converters.zero import param_groups
from converters.zero.checkpoint import Checkpoint, ExpertsError
from converters.zero.files.state_files import State
from converters.zero.merging import roots
from converters.zero.merging.checkpoint import MergedCheckpoint, model_paths


@open_files.once()
def read(path: Name, tag: str | None = None, tied_key: str | None = None) -> Checkpoint:
    """Locates everything that a training goes on from; reads pickles only.

    ``tied_key`` is the key of a pipeline's tied module that no file names.
    ``CheckpointError`` for what is damaged, incomplete, or has no form that ZeRO alone
    would have saved.
    """
    location = source_path(path)
    kind = detect(location, tag).kind.name
    with readable(location, "a file is damaged or of another save"):
        if kind == EXPERTS:
            return _of_experts(location, tag)

        if kind == TENSOR_PARALLEL:
            # which most checkpoints need not
            from converters.zero.merging import tensor_parallel
            from converters.zero.parallel import reader as parallel_reader

            try:
                source = parallel_reader.read(location, tag, complete=True)
            except ExpertsError:
                return _of_experts(location, tag)
            return tensor_parallel.merged(source)

        if kind == PIPELINE:
            from converters.zero.merging import pipeline_lanes
            from converters.zero.pipeline import reader as pipeline_reader

            stages = pipeline_reader.read(location, tag, complete=True)
            return pipeline_lanes.merged(stages, tied_key)

    try:
        checkpoint = zero.read(location, tag)
    except ExpertsError:
        with readable(location, "a file is damaged or of another save"):
            return _of_experts(location, tag)
    return _of_shard_group(checkpoint) if _is_of_mics(checkpoint) else checkpoint


def _is_of_mics(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was configured with shard groups."""
    size = checkpoint.model.setting("zero_optimization", "mics_shard_size")
    return checkpoint.stage == 3 and is_whole_number(size, 1)


def _of_shard_group(checkpoint: Checkpoint) -> MergedCheckpoint:
    """A checkpoint of MiCS, as that of a training on the ranks of its first shard group.

    These hold everything, as plain stage 3. The configuration in their files and the
    number of ranks are those of the whole training; here they are those of the group.
    """
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


def _of_experts(location: Path, tag: str | None) -> Checkpoint:
    from converters.zero.merging import expert_parts  # which most checkpoints need not

    return expert_parts.read(location, tag)
