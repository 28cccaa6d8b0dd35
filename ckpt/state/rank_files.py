"""The files of a rank that resuming needs beside DeepSpeed's: random states and the
user's own, one a rank.

    rng_state_R.state      python, numpy, torch and the devices of rank R
    extra_state_R.state    state_dict() of each object given as extra, by name

No pickle: structure as JSON, tensors as tensors (``plain``). They are safetensors files
under another extension: what loads a model takes every ``*.safetensors`` in a folder
for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.runs.manifest import FileRecord
from ckpt.state import rng
from ckpt.state.plain_file import PlainFile
from converters.errors import CheckpointError
from converters.words import with_article

EXTRA = "extra_state_{}.state"


def state_of(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state of each object, by its name.

    ``CheckpointError`` for one that has none.
    """
    states = {}
    for name, stateful in (extra or {}).items():
        if not callable(getattr(stateful, "state_dict", None)):
            raise CheckpointError(
                f"extra {name} is {with_article(type(stateful).__name__)} without state_dict(); "
                "give an object with state_dict and load_state_dict",
                "output",
            )

        states[str(name)] = stateful.state_dict()

    return states


def write(folder: Path, rank: int, extra: Mapping[str, Any] | None) -> dict[str, FileRecord]:
    """Writes this rank's files, on disk when it returns.

    ``CheckpointError`` names what is not a plain state.
    """
    files = capture(folder, rank, extra)
    return {path.name: file.write(path) for path, file in files}


def capture(
    folder: Path, rank: int, extra: Mapping[str, Any] | None
) -> list[tuple[Path, PlainFile]]:
    """This rank's files, captured now and not yet written, each with its path.

    ``CheckpointError`` names what is not a plain state.
    """
    states = {rng.NAME.format(rank): rng.capture()}
    if extra:
        states[EXTRA.format(rank)] = state_of(extra)
    return [(folder / name, PlainFile(state, str(folder / name))) for name, state in states.items()]
