"""Whether a folder that nobody committed can be a checkpoint at all.

``CheckpointError`` where the disk fails, since nothing can be told then.
"""

from __future__ import annotations

from pathlib import Path

from ckpt.folders.filenames import CONVERSION
from ckpt.runs.manifest import is_inside
from ckpt.runs.run import Run, require_read
from converters import detect
from converters.detect.deepspeed import PARALLEL, UNIVERSAL
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.zero.files import state_files
from converters.zero.files.discovery import is_tag_folder


def only_tag(folder: Path) -> str | None:
    """The one tag in a folder whose ``latest`` is missing or leads nowhere,
    if it is whole."""
    pointer_text = Run(folder).target("latest")
    if pointer_text and is_inside(pointer_text) and (folder / pointer_text).is_dir():
        return None

    tag_folders = [entry for entry in folder.iterdir() if entry.is_dir() and is_tag_folder(entry)]
    if len(tag_folders) != 1 or tag_folders[0].name.startswith("."):
        return None

    try:
        source = detect.read(folder, tag_folders[0].name, complete=True)
    except CheckpointError as error:
        require_read(error)
        return None

    return None if source.kind in (UNIVERSAL, *PARALLEL) else tag_folders[0].name


def why(folder: Path) -> str | None:
    """Why the folder can be no checkpoint; ``None`` if it is one,
    or of a kind not judged here.

    A Trainer's without DeepSpeed, or with ``save_only_model``, has no state files to
    judge by. A model that ckpt made of a checkpoint is none, whatever its name.
    """
    if (folder / CONVERSION).is_file():
        return None

    try:
        detect.read(folder, complete=True)
        return None
    except CheckpointError as error:
        require_read(error)
        message = str(error)
        if error.kind in ("unsupported", "refused") or is_one_nodes(folder):
            return None

    if any(folder.rglob("*_states.pt*")) or not (folder / "trainer_state.json").is_file():
        return message

    for weights_name in (
        "model.safetensors.index.json",
        "model.safetensors",
        "adapter_model.safetensors",
    ):
        if (folder / weights_name).is_file():
            try:
                safetensors.read(
                    folder / weights_name if weights_name.startswith("adapter") else folder
                )
            except CheckpointError as error:
                require_read(error)
                return str(error)

    return None


def is_one_nodes(folder: Path) -> bool:
    """Whether the state files say
    that other nodes have the rest (``use_node_local_storage``)."""
    for state_path in sorted(folder.glob("*/*_states.pt*")):
        try:
            return (
                state_files.read(state_path).setting("checkpoint", "use_node_local_storage") is True
            )
        except CheckpointError:
            continue

    return False


def require_all_nodes(error: CheckpointError, folder: Path) -> None:
    """``CheckpointError`` where other nodes have what is missing: ``error``, and that."""
    is_said = "use_node_local_storage" in str(error)
    if error.kind != "incomplete" or is_said or not is_one_nodes(folder):
        return
    raise CheckpointError(
        f"{error}; it is a part of a save with use_node_local_storage: the other nodes have the "
        "rest, and their files belong into this folder (ckpt collect joins parts that ckpt saved)",
        error.kind,
    ) from error
