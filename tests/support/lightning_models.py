"""A tiny model of Lightning. It is imported by the first test that uses it (heavy_libraries)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule


class Tiny(LightningModule):
    """Tied weights, a buffer, arguments of several kinds."""

    def __init__(
        self, width: int = 3, sizes: tuple[int, ...] = (1,), act: Any = None, **others: Any
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 2))
        self.head = torch.nn.Linear(width, width)
        self.head.weight = self.model[0].weight
        self.register_buffer("count", torch.tensor([7]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint.get("mine")
