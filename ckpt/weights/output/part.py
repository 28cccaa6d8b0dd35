"""Weights beside the main ones, in a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from converters.tensors import Weights


@dataclass(frozen=True, slots=True)
class Part:
    """Weights for a folder inside the output, such as ``2_Dense``.

    They go into a file of the usual name there, such as 2_Dense/model.safetensors, or
    PEFT's name if they are an adapter. ``renamed`` maps each changed name to the name
    in the checkpoint.
    """

    folder: str
    weights: Weights
    renamed: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["model", "adapter"] = "model"
