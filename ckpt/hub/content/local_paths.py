"""Paths of this machine in what is published:
the base model is often named by its folder.

transformers, PEFT and the Trainer write the name as the training gave it. Nobody else
can load it from there, and the Hub refuses a card with it. So it is left out of what is
sent; the files here stay as they are. Seen in transformers 5.23 (``TrainingSummary``)
and PEFT 0.21.2 (``PeftModel.create_or_update_model_card``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ckpt.hub.content import secrets
from ckpt.hub.content.allow_list import CARD
from ckpt.hub.content.items import Item
from converters.lazy_pattern import LazyPattern
from converters.plan import Shard
from converters.storage import bounded_json
from converters.storage.local import naming_path

_KEYS = {  # by file, where the base model is named; and whether the name may be missing
    "adapter_config.json": ("base_model_name_or_path", False),
    "config.json": ("_name_or_path", True),
}
_FIELD = "base_model"  # of a card's metadata
_PATH = LazyPattern(r"[/~\\]|\.{1,2}/|[A-Za-z]:[\\/]|file:")
_HUB_ID = LazyPattern(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LINK = r"\[[^\]\n]*\]\([^)\s]*%s/?\)"


@dataclass(frozen=True, slots=True)
class Published:
    """The files to send without the paths, and a line for each file that had one."""

    items: tuple[Item, ...]
    lines: tuple[str, ...] = ()


def without_paths(items: Sequence[Item], checkpoint_folder: Path) -> Published:
    """The same files,
    those that name the base model by a path of this machine without it.

    ``checkpoint_folder`` is the checkpoint's folder. ``CheckpointError`` for a file
    that is not what was committed.
    """
    published_items, lines = [], []
    for item in items:
        base_name = PurePosixPath(item.name).name
        item_text = _text_of(item) if base_name in _KEYS or item.name == CARD else None
        changed_text = None
        if item_text is not None:
            is_card = item.name == CARD
            changed_text = (
                _clean_card(item_text, checkpoint_folder)
                if is_card
                else _clean_configuration(item_text, checkpoint_folder, *_KEYS[base_name])
            )

        if changed_text is None:
            published_items.append(item)
            continue

        item.require_whole()
        source_name = item.source if isinstance(item.source, Path) else item.name
        field_name = _FIELD if item.name == CARD else _KEYS[base_name][0]
        lines.append(
            f"{source_name}: {field_name} is a path of this machine; it is left out of "
            "what is sent, write a name of the Hub there"
        )
        clean_item = replace(item, source=changed_text.encode(), expected=None)
        published_items.append(clean_item)

    return Published(tuple(published_items), tuple(lines))


def _text_of(item: Item) -> str | None:
    """The text of a small file; ``None`` if the file is large, or not UTF-8."""
    if isinstance(item.source, Shard) or item.nbytes > secrets.MAX_TEXT_BYTES:
        return None

    content = item.source
    if not isinstance(content, bytes):
        with naming_path(content):
            content = content.read_bytes()

    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def is_local(model_name: str, root: Path) -> bool:
    """Whether a model's name is a path, or that of a folder which is here."""
    if _PATH.match(model_name):
        return True

    local_folders = (Path.cwd(), root, *root.absolute().parents)
    return 0 < len(model_name) < 256 and any(
        (folder / model_name).is_dir() for folder in local_folders
    )


def _clean_configuration(
    text: str, checkpoint_folder: Path, key: str, is_optional: bool
) -> str | None:
    try:
        values = bounded_json.loads(text.encode())
    except ValueError:
        return None

    model_name = values.get(key) if isinstance(values, dict) else None
    if not isinstance(model_name, str) or not is_local(model_name, checkpoint_folder):
        return None

    if is_optional:
        del values[key]
    else:
        values[key] = None

    return json.dumps(values, indent=2) + "\n"


def _clean_card(text: str, checkpoint_folder: Path) -> str | None:
    """The card without the lines of its metadata, and the links, that hold such a path."""
    lines = text.splitlines(keepends=True)
    fence_indices = [index for index, line in enumerate(lines) if line.rstrip() == "---"]
    if len(fence_indices) < 2 or fence_indices[0] != 0:
        return None

    metadata_lines = lines[1 : fence_indices[1]]
    local_names = [
        model_name
        for model_name in _base_names(metadata_lines)
        if is_local(model_name, checkpoint_folder) or not _HUB_ID.fullmatch(model_name)
    ]
    if not local_names:
        return None

    kept_lines = [
        line
        for line in metadata_lines
        if not any(_names_path(line, local_name) for local_name in local_names)
    ]
    kept_lines = [
        line for index, line in enumerate(kept_lines) if not _is_emptied(kept_lines, index)
    ]
    card_body = "".join(lines[fence_indices[1] :])
    for local_name in local_names:
        short_name = re.split(r"[/\\]", local_name.rstrip("/\\"))[-1] or _FIELD
        # a short name has no backslash, so it stands for itself in a replacement
        card_body = re.sub(_LINK % re.escape(local_name), short_name, card_body)
        card_body = card_body.replace(local_name, short_name)

    return "".join([lines[0], *kept_lines, card_body])


def _base_names(metadata_lines: Sequence[str]) -> Iterator[str]:
    """The values of ``base_model``, which is one name or a list of them."""
    is_inside_field = False
    for line in metadata_lines:
        field, colon, value = line.partition(":")
        if field == _FIELD and colon:
            is_inside_field = True
        elif is_inside_field and line.lstrip().startswith("- "):
            value = line.lstrip()[2:]
        else:
            is_inside_field = False
            continue

        if model_name := value.strip().strip("'\""):
            yield model_name


def _names_path(line: str, local_name: str) -> bool:
    """Whether a line of metadata has the path as its value, or at the end of a tag."""
    value = line.strip().strip("'\"")
    return value.endswith(local_name) and value[: -len(local_name)].rstrip("'\" ").endswith(
        (":", "-")
    )


def _is_emptied(metadata: Sequence[str], index: int) -> bool:
    """Whether a line is ``base_model:`` with nothing left in its list."""
    next_line = metadata[index + 1].lstrip() if index + 1 < len(metadata) else ""
    return metadata[index].rstrip() == f"{_FIELD}:" and not next_line.startswith("- ")
