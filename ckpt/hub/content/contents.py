"""The contents that a push publishes of a checkpoint, by an allow-list, decided before
the first byte is sent.

model            weights, converted while they are sent; index, config, tokenizer, code, card
adapter          where PEFT is trained: made of the ZeRO states as well, under PEFT's names
weights          of a checkpoint of tier "weights": its safetensors (or adapter) as they are
training state   everything that the manifest lists, and the manifest: to resume elsewhere
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt.folders import filenames
from ckpt.hub.content import card as cards
from ckpt.hub.content import local_paths, model_contents
from ckpt.hub.content import model_facts as known
from ckpt.hub.content.allow_list import CARD
from ckpt.hub.content.items import Contents, Item, require_fitting
from ckpt.hub.content.loss_curve import curve
from ckpt.hub.content.publishable import (
    listed_item,
)
from ckpt.hub.content.suspicions import suspicions
from ckpt.runs.run import RunCheckpoint
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.options import INCLUDE_TRAINING_STATE
from converters.words import shell_word

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def contents(
    checkpoint: RunCheckpoint,
    *,
    dtype: str | None = None,
    max_shard_size: int,
    training_state: bool = False,
    card: bool = True,
    repo: str | None = None,
    revision: str | None = None,
    request: Request | None = None,
) -> Contents:
    """Decides what is sent of ``checkpoint``; reads no tensor.

    ``dtype`` is a key of ``request.DTYPES``; by default fp32 of states, and weights
    alone as they are stored. ``max_shard_size`` is in bytes. ``repo`` ("org/name") and
    ``revision`` are what the card's example loads. ``CheckpointError`` for what cannot
    be published whole, and for what is over the Hub's limits.
    """
    manifest = checkpoint.manifest
    if manifest is not None and manifest.nodes > 1:
        raise CheckpointError(
            f"{checkpoint.folder} holds the part of node {manifest.node} of "
            f"{manifest.nodes}; bring the parts together with ckpt collect and push "
            "the result",
            "refused",
        )

    if training_state:
        published_contents = _training_state(checkpoint)
        source_folder = checkpoint.folder
    else:
        published_contents, source_folder = model_contents.of_model(
            checkpoint, dtype, max_shard_size, request
        )
        if card and CARD not in {item.name for item in published_contents.items}:
            published_contents = _with_card(
                published_contents,
                source_folder,
                repo,
                revision,
            )
        cleaned = local_paths.without_paths(published_contents.items, source_folder)
        warnings = (*published_contents.warnings, *cleaned.lines)
        published_contents = replace(
            published_contents,
            items=cleaned.items,
            warnings=warnings,
        )

    require_fitting(published_contents.items)

    return replace(
        published_contents,
        warnings=(
            *published_contents.warnings,
            *suspicions(source_folder, published_contents.items, training_state),
        ),
    )


def _training_state(checkpoint: RunCheckpoint) -> Contents:
    """Every file that the manifest lists, as it is, and the manifest."""
    checkpoint_folder, manifest = checkpoint.folder, checkpoint.manifest
    if manifest is None or manifest.tier != "full":
        reason = (
            "is of weights alone" if manifest else "has no manifest.json to say what belongs to it"
        )
        raise CheckpointError(
            f"{checkpoint_folder} {reason}; {INCLUDE_TRAINING_STATE} sends committed "
            "checkpoints that a training can go on from, see ckpt ls "
            f"{checkpoint_folder.parent} and ckpt doctor {shell_word(checkpoint_folder.parent)} "
            "--adopt",
            "refused",
        )

    items = [listed_item(checkpoint, name) for name in (*manifest.files, filenames.MANIFEST)]
    entry_names = sorted(path.name for path in checkpoint_folder.iterdir())
    listed_names = {item.name.partition("/")[0] for item in items}
    left_out = tuple(
        (name, "not in the manifest") for name in entry_names if name not in listed_names
    )
    model_facts = known.of_model(checkpoint, checkpoint_folder) | {
        "kind": "training state",
        "dtype": None,
    }

    return Contents(tuple(items), None, left_out, (), model_facts)


def _with_card(
    published_contents: Contents,
    model_root: Path,
    repo: str | None,
    revision: str | None,
) -> Contents:
    """The same with a model card, and a picture of the losses where there are some."""
    training, evaluation = known.losses(model_root)
    loss_picture = curve(training, evaluation)
    card_facts = {**published_contents.facts, "repo": repo, "revision": revision}
    card_text = cards.card(
        card_facts, training, evaluation, cards.PICTURE if loss_picture else None
    )
    made_items = [
        Item(CARD, card_text),
        *([Item(cards.PICTURE, loss_picture)] if loss_picture else []),
    ]
    made_names = tuple(item.name for item in made_items)

    return replace(
        published_contents,
        items=(*published_contents.items, *made_items),
        made_names=made_names,
    )
