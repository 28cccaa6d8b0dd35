"""The files of a tag, by every number in their names.

    mp_rank_MM_model_states.pt                          a model rank: of a pipeline a stage
    [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt    a data rank R of model rank MM
    zero_pp_rank_R_mp_rank_MM_model_states.pt           the same of ZeRO-3
    layer_LL[-model_TT]-model_states.pt                 a layer of a pipeline, in 16 bits
    layer_L_expert_E_mp_rank_MM_model_states.pt         expert E of MoE layer L, in 16 bits
    expp_rank_E_mp_rank_MM_optim_states.pt              experts without ZeRO: the optimizer

Names: ``runtime/engine.py`` (``_get_*_ckpt_name``) and ``runtime/pipe/module.py``
(``ckpt_layer_path``) of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.detect import filenames
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.storage import stores
from converters.zero.files import state_files
from converters.zero.files.state_files import State

_PATTERNS = (
    *(filenames.OPTIMIZER, filenames.PARTITIONED, filenames.MODULE),
    *(filenames.LAYER, filenames.EXPERT, filenames.EXPERT_OPTIMIZER),
)
Identity = tuple[int, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """The state files of a tag.

    ``models`` are by model rank, ``partitioned`` and ``optimizers`` by model rank and
    data rank, ``layers`` by layer and tensor rank (0 where the name has none),
    ``experts`` by layer, expert and model rank, ``expert_optimizers`` by model rank and
    expert rank.
    """

    models: dict[int, Path] = field(default_factory=dict)
    partitioned: dict[int, dict[int, Path]] = field(default_factory=dict)
    optimizers: dict[int, dict[int, Path]] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    expert_optimizers: dict[int, dict[int, Path]] = field(default_factory=dict)

    @property
    def model_ranks(self) -> list[int]:
        """Every model rank that a file is of."""
        by_name = {*self.models, *self.partitioned, *self.optimizers, *self.expert_optimizers}
        return sorted(by_name)


def scan(place: Place) -> FolderFiles:
    """The files of the tag; ``CheckpointError`` for two of one kind and rank."""
    files = FolderFiles()
    for name in stores.names(place.folder):
        for pattern in _PATTERNS:
            if match := pattern.fullmatch(name):
                _add(files, place, pattern, match)
                break

    return files


def _add(files: FolderFiles, place: Place, pattern: LazyPattern[str], match: re.Match[str]) -> None:
    numbers = _numbers(match)
    path = place.folder / match[0]
    previous: Path
    if pattern is filenames.MODULE:
        previous = files.models.setdefault(numbers["mp"], path)
    elif pattern is filenames.LAYER:
        previous = files.layers.setdefault((numbers["layer"], numbers.get("tensor", 0)), path)
    elif pattern is filenames.EXPERT:
        key = (numbers["layer"], numbers["expert"], numbers["mp"])
        previous = files.experts.setdefault(key, path)
    else:
        by_rank = {
            filenames.OPTIMIZER: files.optimizers,
            filenames.PARTITIONED: files.partitioned,
            filenames.EXPERT_OPTIMIZER: files.expert_optimizers,
        }[pattern]
        previous = by_rank.setdefault(numbers["mp"], {}).setdefault(numbers["rank"], path)

    # the fast writer leaves identical copies; the first is used
    if previous != path and match["writer"] is None:
        raise CheckpointError(
            f"{place.folder} has two files of one rank, {previous.name} and {path.name}: two "
            "saves are mixed; move the older one away"
        )


def read(path: Path) -> State:
    """A state file; ``CheckpointError`` if it is damaged,
    or was saved under another name."""
    state = state_files.read(path)
    saved_as = state.file.saved_as
    saved_identity = _identity(f"{saved_as}.pt") if saved_as else None
    if saved_identity is not None and saved_identity != _identity(path.name):
        raise CheckpointError(
            f"{path} was saved as {saved_as}: it is the file of another rank, layer or expert "
            "under this name; give each file back its own name, or copy this one again"
        )

    return state


def _identity(name: str) -> Identity | None:
    """What a name says: which pattern it has, and its numbers."""
    for index, pattern in enumerate(_PATTERNS):
        if match := pattern.fullmatch(name):
            return index, _numbers(match)
    return None


def _numbers(match: re.Match[str]) -> dict[str, int]:
    values = {key: value for key, value in match.groupdict().items() if key != "writer"}
    return {key: int(value) for key, value in values.items() if value is not None}
