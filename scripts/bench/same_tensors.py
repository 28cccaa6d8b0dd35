"""Fails unless two folders of safetensors files hold the same names, types, shapes and bits."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


def files(folder: str) -> dict[str, Any]:
    """The open file that holds each tensor, by its name."""
    opened: list[Any] = [safe_open(path, "np") for path in Path(folder).glob("*.safetensors")]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def main(one: str, other: str) -> None:
    """Compare tensor by tensor."""
    mine, theirs = files(one), files(other)
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    for name, file in mine.items():
        first, second = file.get_tensor(name), theirs[name].get_tensor(name)
        assert first.dtype == second.dtype and first.shape == second.shape, name
        assert np.array_equal(first.view(np.uint8), second.view(np.uint8)), name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
