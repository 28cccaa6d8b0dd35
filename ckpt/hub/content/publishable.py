"""Whether what is to be published may be sent, and whether anybody could load it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt.folders import filenames
from ckpt.hub.content.allow_list import refusal, unsendable
from ckpt.hub.content.items import Item
from ckpt.runs.run import RunCheckpoint
from ckpt.weights.check import stored
from ckpt.weights.companions import module_folders
from ckpt.weights.conversion.task import Conversion
from ckpt.weights.request import Request
from converters.detect import filenames as names
from converters.errors import CheckpointError
from converters.formats import shard_index
from converters.options import (
    CHECK,
    CONFIG,
    DEQUANTIZE,
    EXCLUDE_FROZEN,
    MERGE,
    OTHER_BASE,
    PART,
    RENAME,
    SELECT,
    STRIP,
)
from converters.tensors import DType, TensorRef

_UNUSED = (  # options that change weights, which are sent as they lie there
    *(MERGE, DEQUANTIZE, PART, SELECT, STRIP, RENAME),
    *(OTHER_BASE, EXCLUDE_FROZEN),
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def require_config(
    model_root: Path,
    conversion: Conversion,
    request: Request | None,
) -> None:
    """``CheckpointError`` for a config.json that is broken: nobody could load the model."""
    as_stored = request is not None and request.naming.as_stored
    if conversion.product.kind != "model" or conversion.config is not None or as_stored:
        return
    if os.path.lexists(model_root / "config.json"):
        reasons = [note for note in conversion.notes if note.startswith("config.json")]
        reason = reasons[0] if reasons else ""
        raise CheckpointError(
            f"{model_root / 'config.json'} cannot be published, and a model without it "
            f"cannot be loaded ({reason}); name another with {CONFIG}",
            "refused",
        )


def require_openable(model_root: Path, conversion: Conversion) -> None:
    """``CheckpointError`` for a model that its reader would refuse to open."""
    if conversion.verdict.failure is not None:
        raise CheckpointError(
            f"{model_root}: {conversion.verdict.failure}: nobody could load what would be "
            f"published; correct that first; {CHECK('none')} publishes it anyway",
            "unloadable",
        )


def require_loadable(
    stored_root: Path,
    path: Path,
    tensors: Mapping[str, TensorRef],
    is_adapter: bool,
    request: Request | None,
) -> list[str]:
    """Returns what a user must know of weights that are sent as they are.

    ``CheckpointError`` (kind "unloadable") if nobody would load them.
    """
    if is_adapter:
        stored.require_adapter(path, tensors)
        return []

    wishes = request or Request()
    wishes.refuse(_UNUSED, f"{stored_root}, whose weights are sent as they lie there")
    verdict = stored.require_model(stored_root, tensors, wishes.check, wishes.untie)
    return list(verdict.notes)


def is_adapter_folder(root: Path) -> bool:
    """Whether a folder's weights are those of an adapter of PEFT."""
    has_model = any((root / name).is_file() for name in (*names.SAFETENSORS, *names.TORCH_BIN))
    has_adapter = any((root / name).is_file() for name in names.ADAPTERS)
    return (root / "adapter_config.json").is_file() or (has_adapter and not has_model)


def require_no_pickle(root: Path) -> None:
    """``CheckpointError`` for an adapter that is there as a pickle alone."""
    pickled, path = root / names.ADAPTERS[1], root / names.ADAPTERS[0]
    if pickled.is_file() and not path.is_file():
        raise CheckpointError(
            f"{pickled} is a pickle, which is not published; load the adapter with "
            "PeftModel.from_pretrained and save it again with save_pretrained, which writes "
            f"{path.name}",
            "refused",
        )


def has_safetensors(root: Path) -> bool:
    """Whether a folder's weights are sent as they lie there: all but pickles of a model."""
    is_pickled = not any((root / name).is_file() for name in names.SAFETENSORS)
    return is_adapter_folder(root) or not is_pickled


def weights_names(stored_root: Path) -> list[str]:
    """The files of weights in a folder without ZeRO states: one,
    or an index and its shards.

    One counts where both are there, as it does for ``from_pretrained``.
    """
    has_one = os.path.lexists(stored_root / WEIGHTS)
    has_index = (stored_root / INDEX).is_file() and refusal(stored_root, INDEX) is None
    if has_index and not has_one:
        shard_names = shard_index.shard_names(stored_root / INDEX)
        foreign_names = [name for name in shard_names if not name.endswith(".safetensors")]
        if foreign_names:
            raise CheckpointError(
                f"{stored_root / INDEX} names {foreign_names[0]}, which is not a safetensors file",
                "refused",
            )

        return [INDEX, *shard_names]

    if not has_one:
        raise CheckpointError(
            f"{stored_root} has neither {WEIGHTS} nor {INDEX}; expected one, as "
            "pickles are not published",
            "incomplete",
        )

    return [WEIGHTS]


def module_weights_names(stored_root: Path) -> list[str]:
    """The weights of a sentence-transformers model's modules
    that have folders of their own."""
    folders = [module.folder for module in module_folders.modules(stored_root) if module.folder]
    candidates = [f"{folder}/{WEIGHTS}" for folder in dict.fromkeys(folders)]
    return [name for name in candidates if (stored_root / name).is_file()]


def dominant_type(tensors: Iterable[TensorRef]) -> DType:
    """The floating-point type of most bytes."""
    bytes_by_type: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype.floating:
            bytes_by_type[tensor.dtype] += tensor.nbytes

    return max(bytes_by_type, key=lambda dtype: bytes_by_type[dtype], default=DType.F32)


def listed_item(
    checkpoint: RunCheckpoint,
    file_name: str,
    must_be_listed: bool = True,
) -> Item:
    """A file of the checkpoint that has to be sent;
    ``CheckpointError`` if it may not be.

    ``must_be_listed``: where there is a manifest, it has to list the file.
    """
    manifest_files = checkpoint.manifest.files if checkpoint.manifest else {}
    reason = refusal(checkpoint.folder, file_name)
    if (
        must_be_listed
        and manifest_files
        and file_name not in manifest_files
        and file_name != filenames.MANIFEST
    ):
        reason = reason or "the manifest does not list it, so it was not committed"

    if reason is not None:
        raise unsendable(checkpoint.folder, file_name, reason)

    return Item(file_name, checkpoint.folder / file_name, manifest_files.get(file_name))
