"""Options without effect on what is written: each one given is named in a note."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.storage import stores


def of_model(root: Path, request: Request, surroundings: Surroundings) -> tuple[str, ...]:
    """Notes where the weights are not taken for an adapter.

    ``CheckpointError`` (refused) for ``--merge``: the output would not be what was
    asked for.
    """
    reason = f"{root} holds no PEFT adapter"
    if request.merge:
        raise CheckpointError(
            f"--merge: {reason}, so there is nothing to merge; leave it out", "refused"
        )

    path = surroundings.config_path
    configures = path is not None and request.base is not None and request.base in path.parents

    return (
        *_notes(
            {
                "--base": request.base is not None and not configures,
                "--adapter-config": request.adapter_config is not None,
                "--other-base": request.other_base,
            },
            reason,
        ),
        *_notes(
            {"--untie": request.untie and surroundings.config is None},
            "no config.json is written",
        ),
    )


def of_adapter(request: Request) -> tuple[str, ...]:
    """Notes for an adapter's folder, which has no config.json and no base in it.

    With a config.json readers would take the folder for a model (``adapter_folder``).
    """
    reason = "the folder of an adapter has no config.json; --merge writes a model, which has one"
    path = request.config
    within = path is not None and stores.is_folder(path)  # other files of the folder are taken

    return (
        *_notes(
            {"--untie": request.untie, "--config": path is not None and not within},
            reason,
        ),
        *([f"the config.json in --config {path} is not written: {reason}"] if within else ()),
        *_notes(
            {"--dequantize": request.dequantize},
            "an adapter has no quantized weights; --merge dequantizes those of the base",
        ),
        *_notes({"--other-base": request.other_base}, "only --merge takes weights of a base"),
    )


def of_merge(request: Request, elsewhere: bool) -> tuple[str, ...]:
    """Notes for a merge; ``elsewhere`` says whether the base's weights lie elsewhere."""
    return _notes(
        {"--other-base": request.other_base and not elsewhere},
        "the adapter is merged into the checkpoint's own copy of the base",
    )


def _notes(idle: Mapping[str, bool], reason: str) -> tuple[str, ...]:
    """A line for each option that is given."""
    return tuple(
        f"{option} has no effect: {reason}" for option, is_given in idle.items() if is_given
    )
