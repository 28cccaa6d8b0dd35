"""What speaks against the files of a checkpoint being of one save, when it is to be committed."""

from __future__ import annotations

from ckpt.runs.foreign import overwriting, value_samples
from converters.source import Source
from converters.zero.checkpoint import Checkpoint


def doubt(source: Source, is_one_save: bool) -> str | None:
    """What speaks against DeepSpeed's files being of one save, if anything does.

    ``CheckpointError`` if these are their values, unless somebody has said that they are.
    """
    folder = source.place.root
    if isinstance(source, Checkpoint) and source.ranks:
        if not is_one_save:
            value_samples.require_same(source, value_samples.remedy_of(source, folder))
        elif (difference := value_samples.difference_in(source)) is not None:
            return difference.replace(f"{folder}/", "")

    time_doubt = overwriting.doubt(folder, source.place.tag) if is_one_save else None
    return None if time_doubt is None else time_doubt.sentence
