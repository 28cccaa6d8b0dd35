"""Options without effect on what is written: each one given is named in a note."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.options import (
    ADAPTER_CONFIG,
    BASE,
    CONFIG,
    DEQUANTIZE,
    MERGE,
    OTHER_BASE,
    UNTIE,
    Option,
)
from converters.storage import stores


def of_model(root: Path, request: Request, surroundings: Surroundings) -> tuple[str, ...]:
    """Notes where the weights are not taken for an adapter.

    ``CheckpointError`` (refused) for ``--merge``: the output would not be what was
    asked for.
    """
    reason = f"{root} holds no PEFT adapter"
    if request.merge:
        raise CheckpointError(
            f"{MERGE}: {reason}, so there is nothing to merge; leave it out", "refused"
        )

    path = surroundings.config_path
    configures = path is not None and request.base is not None and request.base in path.parents

    return (
        *_notes(
            {
                BASE: request.base is not None and not configures,
                ADAPTER_CONFIG: request.adapter_config is not None,
                OTHER_BASE: request.other_base,
            },
            reason,
        ),
        *_notes(
            {UNTIE: request.untie and surroundings.config is None},
            "no config.json is written",
        ),
    )


def of_adapter(request: Request) -> tuple[str, ...]:
    """Notes for an adapter's folder, which has no config.json and no base in it.

    With a config.json readers would take the folder for a model (``adapter_folder``).
    """
    reason = f"the folder of an adapter has no config.json; {MERGE} writes a model, which has one"
    path = request.config
    within = path is not None and stores.is_folder(path)  # other files of the folder are taken

    return (
        *_notes(
            {UNTIE: request.untie, CONFIG: path is not None and not within},
            reason,
        ),
        *([f"the config.json in {CONFIG(path)} is not written: {reason}"] if within else ()),
        *_notes(
            {DEQUANTIZE: request.dequantize},
            f"an adapter has no quantized weights; {MERGE} dequantizes those of the base",
        ),
        *_notes({OTHER_BASE: request.other_base}, f"only {MERGE} takes weights of a base"),
    )


def of_merge(request: Request, elsewhere: bool) -> tuple[str, ...]:
    """Notes for a merge; ``elsewhere`` says whether the base's weights lie elsewhere."""
    return _notes(
        {OTHER_BASE: request.other_base and not elsewhere},
        "the adapter is merged into the checkpoint's own copy of the base",
    )


def _notes(idle: Mapping[Option, bool], reason: str) -> tuple[str, ...]:
    """A line for each option that is given."""
    return tuple(
        f"{option} has no effect: {reason}" for option, is_given in idle.items() if is_given
    )
