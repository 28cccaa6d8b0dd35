"""Where the output of a conversion may be: not in the place of what is read.

An output folder changes places with what is there (``staging``), so one that holds a
base model, or the folder that config.json is taken from, would delete it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ckpt.folders import staging
from ckpt.folders.filenames import CONVERSION
from ckpt.runs import user_paths
from ckpt.runs.foreign import replaceable
from ckpt.weights.conversion.task import Conversion
from converters.errors import CheckpointError
from converters.options import OUTPUT
from converters.storage import stores


def workplace(conversion: Conversion, overwrite: bool) -> Path:
    """The folder to make; ``CheckpointError`` if the output cannot be there."""
    _require_readable(conversion.companions)
    output, source = conversion.output, conversion.checkpoint.place
    # a file's folder holds it, and is not what is read
    sources = [] if stores.is_file(conversion.path) else [conversion.path, source.folder]
    user_paths.require_outside(output, sources)
    if conversion.is_file:
        _require_other_file(conversion)
        staging.require_file_place(output, overwrite)
        return staging.folder_of_file(output)

    source_folders = [source.folder.resolve(), source.root.resolve()]
    protected = [
        *source_folders,
        *(parent for folder in source_folders for parent in folder.parents),
    ]
    if output.name and output.resolve() not in protected:
        _require_other_folder(conversion)
    staging.require_place(output, protected, overwrite)
    replaceable.require_replaceable(output)
    if output.exists():
        from ckpt.weights.companions import replaced_folder  # which a new output need not

        replaced_folder.require_replaceable_files(output, _written_names(conversion))

    return output


def _require_readable(companions: Mapping[str, Path]) -> None:
    """Raises for a file that could not be copied later, when all weights are written."""
    for path in companions.values():
        if not stores.is_readable(path):
            raise CheckpointError(
                f"{path} cannot be read; make it readable or move it away", "incomplete"
            )


def _written_names(conversion: Conversion) -> set[str]:
    """The files of the output, by path relative to it."""
    plan = conversion.plan
    index_names = set() if plan.index is None else {plan.index[0]}
    shard_names = {shard.filename for shard in plan.shards}
    return {CONVERSION, *shard_names, *index_names, *conversion.companions, *conversion.texts}


def _require_other_folder(conversion: Conversion) -> None:
    """Raises where the output would replace a folder that something is read from."""
    place = conversion.output.resolve()
    for path, purpose in _read_besides(conversion):
        folder = path.resolve()
        if place == folder or place in folder.parents:
            relation = "is the folder" if place == folder else f"holds {path},"
            raise CheckpointError(
                f"{conversion.output} {relation} {purpose}, and the output would replace "
                f"it; name another folder with {OUTPUT}",
                "output",
            )


def _require_other_file(conversion: Conversion) -> None:
    """``CheckpointError`` where the output would replace a file of what is read."""
    place = conversion.output.resolve()
    besides = {path.resolve() for path, _ in _read_besides(conversion)}
    is_read = place in besides or conversion.checkpoint.place.folder.resolve() in place.parents
    if is_read and conversion.output.exists():
        raise CheckpointError(
            f"{conversion.output} is a file that the output is made of, and the output "
            f"would replace it; name another file with {OUTPUT}",
            "output",
        )


def _read_besides(conversion: Conversion) -> Iterator[tuple[Path, str]]:
    """The paths that are read besides the checkpoint, each with its purpose."""
    for option, path in conversion.option_paths.items():
        yield path, f"which {option} names"
    product = conversion.product
    if product.surroundings.config_path is not None:
        yield product.surroundings.config_path, "which config.json is taken from"
    for path in product.surroundings.companions.values():
        yield path, "which is copied"
    for path in product.files:
        yield path, "which weights are read from"
