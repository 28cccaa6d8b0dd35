"""The doubts whether the files of a checkpoint are of one save,
when it is to be committed."""

from __future__ import annotations

from ckpt.runs.foreign import overwriting, value_samples
from ckpt.runs.upkeep import stored_weights
from converters.detect.deepspeed import PARALLEL
from converters.detect.filenames import ADAPTER
from converters.errors import CheckpointError
from converters.source import Source
from converters.words import shell_word
from converters.zero.checkpoint import Checkpoint


def doubt(source: Source, is_one_save: bool, is_of_user: bool) -> str | None:
    """The doubt whether the files are of one save, if there is one.

    ``CheckpointError`` if these are the values of DeepSpeed's files, or of the weights
    beside them, unless somebody has said that they are. Those weights, which no resume
    reads, are compared where the wish is ``is_of_user``.
    """
    folder = source.place.root
    has_states = source.kind in PARALLEL or (isinstance(source, Checkpoint) and source.ranks)
    if has_states:
        if not is_one_save:
            value_samples.require_same(source, value_samples.remedy_of(source, folder))
        elif (difference := value_samples.difference_in(source)) is not None:
            return difference.replace(f"{folder}/", "")
        if is_of_user and (difference := _difference_beside(source)) is not None:
            if not is_one_save:
                raise CheckpointError(f"{folder}/{difference}{_way(source)}")
            return difference

    time_doubt = overwriting.doubt(folder, source.place.tag) if is_one_save else None
    return None if time_doubt is None else time_doubt.sentence


def _difference_beside(source: Source) -> str | None:
    """That weights beside DeepSpeed's files have other values than the states, as words
    after the folder's name: of a model by a sample, of an adapter, which is small, all."""
    folder, tag = source.place.root, source.place.tag
    try:
        comparison = stored_weights.plan(folder, "", tag) if tag is not None else None
    except CheckpointError:
        return None  # of a form that is not compared
    if comparison is None:
        return None

    try:
        stored_weights.compare(comparison, in_sample=comparison.name != ADAPTER)
    except CheckpointError as error:
        return str(error).replace(f"{folder}/", "")
    return None


def _way(source: Source) -> str:
    """What helps, beside weights of the states."""
    folder = shell_word(source.place.root)
    return (
        "; no resume reads them: delete them or bring back the right ones; if you changed them "
        f"yourself, ckpt doctor {folder} --adopt --one-save commits them as they are"
    )
