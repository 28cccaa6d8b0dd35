"""The checkpoint at a path, as ZeRO alone would have saved it."""

from __future__ import annotations

from converters.detect import detect
from converters.detect.deepspeed import PIPELINE, TENSOR_PARALLEL
from converters.errors import readable
from converters.storage import open_files
from converters.storage.store import Name
from converters.storage.stores import source_path
from converters.zero import checkpoint as zero
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import mics


@open_files.once()
def read(path: Name, tag: str | None = None) -> Checkpoint:
    """Locates everything that a training goes on from; reads pickles only.

    ``CheckpointError`` for what is damaged, incomplete, or has no form that ZeRO alone would
    have saved.
    """
    location = source_path(path)
    kind = detect(location, tag).kind.name
    with readable(location, "a file is damaged or of another save"):
        if kind == TENSOR_PARALLEL:
            # which most checkpoints need not
            from converters.zero.merging import tensor_parallel
            from converters.zero.parallel import reader as parallel_reader

            return tensor_parallel.merged(parallel_reader.read(location, tag, complete=True))

        if kind == PIPELINE:
            from converters.zero.merging import pipeline
            from converters.zero.pipeline import reader as pipeline_reader

            source = pipeline_reader.read(location, tag, complete=True)
            return pipeline.merged(pipeline.require_partitions(source))

    checkpoint = zero.read(location, tag)
    return mics.merged(checkpoint) if mics.is_of_mics(checkpoint) else checkpoint
