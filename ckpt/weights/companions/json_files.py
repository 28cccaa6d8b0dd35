"""JSON files beside weights, read as far as they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.storage import bounded_json, stores

MAX_JSON_BYTES = 64 << 20  # bytes of a configuration; larger ones are not looked into


def read(path: Path, purpose: str, *, infinite: bool = False) -> Any:
    """The content of a JSON file; with ``infinite`` it may have NaN and Infinity in it.

    ``purpose`` says what the file is for, as in "too large for a configuration".
    ``CheckpointError`` for what cannot be read, or is not JSON.
    """
    try:
        if stores.regular_size(path) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large for {purpose}", "refused")
        data = stores.content(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "incomplete") from error

    try:
        return bounded_json.loads(data, infinite=infinite)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
