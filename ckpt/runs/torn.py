"""Whether a folder that nobody committed can be a checkpoint at all.

``CheckpointError`` where the disk fails, since nothing can be told then.
"""

from __future__ import annotations

from pathlib import Path

from ckpt.runs.manifest import is_inside
from ckpt.runs.run import Run, require_read
from converters import safetensors, states, zero
from converters.errors import CheckpointError
from converters.folder import is_tag_folder


def only_tag(folder: Path) -> str | None:
    """The one tag in a folder whose ``latest`` is missing or leads nowhere, if it is whole."""
    named = Run(folder).target("latest")
    if named and is_inside(named) and (folder / named).is_dir():
        return None
    tags = [entry for entry in folder.iterdir() if entry.is_dir() and is_tag_folder(entry)]
    if len(tags) != 1 or tags[0].name.startswith("."):
        return None
    try:
        zero.read(folder, tags[0].name)
    except CheckpointError as error:
        require_read(error)
        return None
    return tags[0].name


def why(folder: Path) -> str | None:
    """Why the folder can be no checkpoint; ``None`` if it is one, or of a kind not judged here.

    A Trainer's without DeepSpeed, or with ``save_only_model``, has no state files to judge by.
    """
    try:
        zero.read(folder)
        return None
    except CheckpointError as error:
        require_read(error)
        said = str(error)
        if error.kind in ("unsupported", "refused") or _is_one_nodes(folder):
            return None
    if any(folder.rglob("*_states.pt*")) or not (folder / "trainer_state.json").is_file():
        return said
    for name in ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            try:
                safetensors.read(folder / name if name.startswith("adapter") else folder)
            except CheckpointError as error:
                require_read(error)
                return str(error)
    return None


def _is_one_nodes(folder: Path) -> bool:
    """Whether the state files say that other nodes have the rest (``use_node_local_storage``)."""
    for path in sorted(folder.glob("*/*_states.pt*")):
        try:
            return states.read(path).setting("checkpoint", "use_node_local_storage") is True
        except CheckpointError:
            continue
    return False
