"""The texts of a push that should perhaps not be public, named before they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt.hub.content import secrets
from ckpt.hub.content.allow_list import CARD
from ckpt.hub.content.items import Item
from converters.plan import Shard
from converters.storage.local import naming_path

# by file, where PEFT and transformers name the base model as it was given to them
_BASES = {
    CARD: "base_model",
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
}


def suspicions(
    model_root: Path,
    items: Sequence[Item],
    keeps_paths: bool,
) -> Iterator[str]:
    """A line for each thing in the texts to be sent that should perhaps not be public.

    ``keeps_paths``: the files are sent with the paths of this machine that are in them.
    """
    for item in items:
        if isinstance(item.source, Shard) or not secrets.is_readable_text(item.name):
            continue

        is_own_config = item.name == "config.json" and (model_root / item.name).is_file()
        # as it was, where its type was changed
        source = model_root / item.name if is_own_config else item.source
        if isinstance(source, bytes):
            source_name, source_bytes = item.name, source
        elif source.stat().st_size <= secrets.MAX_TEXT_BYTES:
            with naming_path(source):
                source_name, source_bytes = str(source), source.read_bytes()
        else:
            yield f"{source} is too large to be looked through for secrets"
            continue

        for secret in secrets.secrets(source_bytes):
            place = f"{source_name}, line {secret.line}"
            yield f"{place}: looks like {secret.kind}; remove it and revoke it"
        base_key = _BASES.get(item.name) if keeps_paths else None
        if base_key and re.search(
            rb'\b%b"?: *["\']?(?:[/~]|[A-Za-z]:\\)' % base_key.encode(), source_bytes
        ):
            yield (
                f"{source_name}: {base_key} is a path of this machine; "
                "write a name of the Hub there"
            )
