"""The model files of a universal folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters import words
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.storage import stores
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import one_save
from converters.zero.universal import merged_models
from converters.zero.universal.group_layouts import saving_ranks, world_size_of
from converters.zero.universal.merged_models import MergedModel

_MODEL = LazyPattern(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")


def read(place: Place, parallel: bool) -> tuple[list[State], MergedModel | None]:
    """The model files: that of stages 1 and 2 if it is there, else those of stage 3.

    Those of several model-parallel ranks come as one, with what it was made of.
    """
    paths: dict[int, dict[int, Path]] = {}
    for name in stores.names(place.folder):
        if not name.endswith("_states.pt"):
            continue

        path, match = place.folder / name, _MODEL.fullmatch(name)
        if match is None or (int(match["mp"]) and not parallel):
            raise CheckpointError(
                f"{path}: universal checkpoints of tensor, pipeline or expert parallelism are read "
                "for their weights and states (ckpt show, to-fp32, ckpt.open), and nothing else "
                "is made of them",
                "unsupported",
            )

        rank = -1 if match["rank"] is None else int(match["rank"])
        paths.setdefault(int(match["mp"]), {})[rank] = path

    if len(paths) < 2:
        return _of_one_rank(place, paths.get(0, {})), None

    one_save.require_numbered(place, "model files of mp_rank_N", max(paths) + 1, paths)
    models = [_of_one_rank(place, paths[model_rank]) for model_rank in sorted(paths)]
    one_save.require_numbered(
        place, "model files of mp_rank_N", world_size_of(models[0][0], "mp_world_size"), paths
    )
    merged = merged_models.read([model for model, *_ in models])
    return [merged.model], merged


def _of_one_rank(place: Place, paths_by_rank: Mapping[int, Path]) -> list[State]:
    """The model files of one model-parallel rank."""
    if -1 in paths_by_rank:
        return [state_files.read(paths_by_rank[-1])]
    if 0 not in paths_by_rank:
        raise CheckpointError(
            f"{place.folder} has no model file (mp_rank_00_model_states.pt or "
            "zero_pp_rank_0_mp_rank_00_model_states.pt); copy it from the checkpoint "
            "that it was made from",
            "incomplete",
        )

    models = [state_files.read(paths_by_rank[rank]) for rank in sorted(paths_by_rank)]
    count = saving_ranks(models[0])
    if sorted(paths_by_rank) != list(range(count)):
        raise CheckpointError(
            f"{place.folder} has the model files of ranks "
            f"{words.numbers(sorted(paths_by_rank))}, but "
            f"was saved by {count}; copy the others from the "
            "checkpoint that it was made from",
            "incomplete",
        )

    return models
