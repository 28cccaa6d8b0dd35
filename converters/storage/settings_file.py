"""A small file of the user's that says what to do: TOML, or JSON with the same content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.storage import bounded_json, stores

MAX_BYTES = 1 << 20


def read(path: Path, content: str) -> dict[str, Any]:
    """The content of a file; ``content`` is what it should have, for errors.

    ``CheckpointError`` (kind "refused") for a file that cannot be read, or is no table.
    """
    try:
        text = stores.head(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "refused") from error

    load = bounded_json.loads if path.suffix == ".json" else _toml
    try:
        values = load(text.encode())
    except ValueError as error:
        raise CheckpointError(f"{path} is neither TOML nor JSON: {error}", "refused") from error

    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no table: expected {content}", "refused")
    return values


def _toml(data: bytes) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise ValueError("Python 3.10 reads no TOML: write it as .json") from None
    return tomllib.loads(data.decode())
