"""The files that an output folder may take the place of: its own names, a model's
files, and ckpt's own.

Everything in a folder that is replaced is gone. So each file in it must be one that is
made again, or one by which a folder is a model (``model_folder``) or an output of ckpt:

    conversion.json   of ``ckpt to-fp32``; it lists the files of weights
    rewriting.json    of ``ckpt reshard`` and its like, or a manifest that names a source
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ckpt.folders.filenames import CONVERSION, MANIFEST, PINNED, REWRITING
from ckpt.folders.replacing import is_arriving
from ckpt.runs import ancestry, conversions
from ckpt.runs.checkpoint_folder import open_checkpoint
from ckpt.runs.recognition import is_weights
from ckpt.weights.companions import model_folder, module_folders
from converters.errors import CheckpointError
from converters.options import OUTPUT
from converters.storage import stores
from converters.words import some

_MAX_NAMES = 5
# What lies beside the weights of a model: what save_pretrained and the Trainer's
# save_model write, and a model card; the records of a download (huggingface_hub 1.x,
# local_dir=).
_OF_MODEL = (
    *("config.json", "adapter_config.json", "training_args.bin", CONVERSION),
    *("README.md", "LICENSE*", "USE_POLICY.md", "NOTICE*", ".gitattributes"),
    ".cache/huggingface/*",
)
# What rewriting leaves of a training, beside what a model has: the files that are
# copied, the states of DeepSpeed in the folder of the tag, and those of DCP.
_OF_REWRITING = (
    *(REWRITING, MANIFEST, PINNED, "latest", "latest_universal", "trainer_state.json"),
    *("rng_state*.pth", "extra_state_*.state", "random_states_*.pkl"),
    *("scheduler*.pt", "scheduler*.bin", "scaler.pt", "sampler*.bin", "dl_state_dict*.bin"),
    *("custom_checkpoint_*.pkl", "zero_to_fp32.py", "zero_to_torch.py"),
    *(".metadata", "*.distcp", "meta.pt", "optimizer*.bin", "optimizer*.pt"),
    *("pytorch_model_fsdp_*/.metadata", "pytorch_model_fsdp_*/*.distcp"),
    *("optimizer_*/.metadata", "optimizer_*/*.distcp"),
)
_STATES = ("*_states.pt", "zero/*.pt")  # in the folder of a tag


def require_replaceable_files(output: Path, written_names: Collection[str]) -> None:
    """``CheckpointError`` where a folder holds files
    that an output would not bring back.

    ``written_names`` are the files of the output, relative to it. The message lists what
    would be gone.
    """
    if not output.is_dir() or is_arriving(output):
        return

    lost_names = sorted(_unknown(output, written_names))
    if lost_names:
        raise CheckpointError(
            f"{output} holds what is no model's and not made by ckpt: "
            f"{some(lost_names, _MAX_NAMES)}; the output would replace the whole folder, so move "
            f"that away, or name another folder with {OUTPUT}",
            "output",
        )


def _unknown(output: Path, written_names: Collection[str]) -> Iterator[str]:
    """The names of the files that neither a model has nor ckpt wrote."""
    names = list(_files(output))
    listed_names = {*written_names, *_recorded(output)}
    patterns: tuple[str, ...] = ()
    if any(is_weights(name) for name in names) or conversions.conversion_in(output) is not None:
        patterns += _OF_MODEL
        listed_names |= _of_model(output)

    tag_folder = None
    if _is_rewritten(output):
        patterns += (*_OF_MODEL, *_OF_REWRITING)
        tag_folder = _only_tag(names)

    for name in names:
        folder, _, inner_name = name.partition("/")
        is_state = folder == tag_folder and _fits(inner_name, _STATES)
        if name not in listed_names and not is_state and not _fits(name, patterns):
            yield name


def _fits(name: str, patterns: Collection[str]) -> bool:
    """Whether a name fits;
    a pattern without a slash is of a file directly in the folder."""
    return any(
        fnmatchcase(name, pattern) and (pattern.count("/") or "/" not in name)
        for pattern in patterns
    )


def _files(folder: Path) -> Iterator[str]:
    """All files and links, by path relative to the folder, with slashes."""
    for parent, subfolders, filenames in os.walk(folder):
        links = [name for name in subfolders if os.path.islink(Path(parent, name))]
        for name in (*filenames, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def _recorded(output: Path) -> set[str]:
    """What the records of ckpt list: the files of weights,
    or those of a rewritten checkpoint."""
    manifest = open_checkpoint(output).manifest
    if manifest is not None:
        return set(manifest.files)

    document: Any = ancestry.document_in(output / CONVERSION, conversions.MAX_BYTES)
    entries = document.get("files") if isinstance(document, dict) else None
    names = [entry.get("name") for entry in entries or () if isinstance(entry, dict)]
    return {name for name in names if isinstance(name, str)}


def _of_model(output: Path) -> set[str]:
    """The weights, and the files of the model, its tokenizer and its modules."""
    folders = [""]
    names: set[str] = set()
    with suppress(CheckpointError, OSError):
        names |= model_folder.companion_files(output).files.keys()
        folders += [module.folder for module in module_folders.modules(output) if module.folder]
    for folder in folders:
        paths = [output / folder / name for name in stores.names(output / folder)]
        names |= {p.relative_to(output).as_posix() for p in paths if is_weights(p.name)}

    return names


def _is_rewritten(output: Path) -> bool:
    source = open_checkpoint(output).source
    return source is not None and source.is_rewriting


def _only_tag(names: Collection[str]) -> str | None:
    """The folder of states; ``None`` where there are several:
    a training saved into it since."""
    tag_names = {
        folder
        for folder, _, inner_name in (name.partition("/") for name in names)
        if inner_name and _fits(inner_name, _STATES)
    }
    return tag_names.pop() if len(tag_names) == 1 else None
