"""The checkpoint at a path, as ZeRO alone would have saved it."""

from __future__ import annotations

from pathlib import Path

from converters.detect import detect
from converters.detect.deepspeed import EXPERTS, PIPELINE, TENSOR_PARALLEL
from converters.errors import readable
from converters.storage import open_files
from converters.storage.store import Name
from converters.storage.stores import source_path
from converters.zero import checkpoint as zero
from converters.zero.checkpoint import Checkpoint, ExpertsError
from converters.zero.merging import mics


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
    return mics.merged(checkpoint) if mics.is_of_mics(checkpoint) else checkpoint


def _of_experts(location: Path, tag: str | None) -> Checkpoint:
    from converters.zero.merging import expert_parts  # which most checkpoints need not

    return expert_parts.read(location, tag)
