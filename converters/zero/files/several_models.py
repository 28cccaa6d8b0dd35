"""Several models in one folder,
each under a tag of its own: none of them is chosen silently.

Accelerate's ``save_state`` writes ``pytorch_model``, ``pytorch_model_1`` and so on, one
a model (``accelerator.py``: ``MODEL_NAME``); a training of its own may have ``actor``
and ``critic``. ``latest`` names the one that was saved last. Tags that are steps
(``global_step10``) are of one.
"""

from __future__ import annotations

import re
from pathlib import Path

from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import TAG
from converters.zero.files import discovery, state_files
from converters.zero.files.state_files import State

_ACCELERATE = LazyPattern(r"pytorch_model(_\d+)?")
MOST_READ = 16  # tags that are looked into


def find(path: Path, tag: str | None = None) -> discovery.Place:
    """Finds the tag that a path means,
    as ``discovery.find`` does, also among several models.

    ``CheckpointError`` where ``path`` holds several models and no ``tag`` chooses one.
    """
    place = discovery.find(path, tag)
    if tag is None and place.folder != path:
        require_one(place)
    return place


def require_one(place: discovery.Place) -> None:
    """Raises ``CheckpointError`` if the root holds further models beside this one."""
    other_tags = [tag for tag in discovery.tags(place.root) if tag != place.tag]
    if not other_tags:
        return

    further_models = [tag for tag in other_tags if _ACCELERATE.fullmatch(tag)]
    if not (further_models and _ACCELERATE.fullmatch(place.tag)):
        further_models = _models_of_same_step(place, other_tags)
    if further_models:
        names = sorted((place.tag, *further_models))
        raise CheckpointError(
            f"{place.root} holds {len(names)} models, {', '.join(names)}; choose one with "
            f"{TAG} (latest names {place.tag}, which was saved last), or name its folder, "
            f"such as {place.root / names[0]}",
            "incomplete",
        )


def _models_of_same_step(place: discovery.Place, other_tags: list[str]) -> list[str]:
    """The tags of other parameters that were saved at the same step.

    No training has both.
    """
    unnumbered = [tag for tag in (place.tag, *other_tags) if not re.search(r"\d", tag)]
    if place.tag not in unnumbered or not 1 < len(unnumbered) <= MOST_READ:
        return []

    own_model = _first_model(place.folder)
    if own_model is None:
        return []

    models = {tag: _first_model(place.root / tag) for tag in unnumbered if tag != place.tag}
    return [tag for tag, model in models.items() if model and _differ(own_model, model)]


def _first_model(tag: Path) -> State | None:
    """The first model file of a tag; ``None`` if it has none that can be read."""
    try:
        files = discovery.scan(discovery.Place(tag.parent, tag, tag.name))
        model_path = files.module or next(iter(files.partitioned.values()), None)
        return state_files.read(model_path) if model_path is not None else None
    except (CheckpointError, OSError):
        return None


def _differ(first: State, second: State) -> bool:
    step = first.root.get("global_steps")
    if type(step) is not int or second.root.get("global_steps") != step:
        return False
    try:
        if _shapes(first) != _shapes(second):
            return True
    except CheckpointError:
        return False

    first_crcs = [checksum.crc32 for checksum in first.file.checksums]
    second_crcs = [checksum.crc32 for checksum in second.file.checksums]
    return None not in first_crcs and first_crcs != second_crcs


def _shapes(model: State) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for group in state_files.shapes(model, "param_shapes") or ()
        for name, shape in group.items()
    }
