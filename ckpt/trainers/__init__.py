"""Savers for trainers: ``hf``, ``accelerate``,
``lightning``; each loaded when it is first used.

accelerate_plain   Accelerate without DeepSpeed
lightning_folders  what ModelCheckpoint saves into;  lightning_resume  a fit that goes on
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """``ckpt.trainers.hf`` and its like, without an import of their own."""
    if name in ("hf", "accelerate", "lightning"):
        return import_module(f"ckpt.trainers.{name}")
    raise AttributeError(f"module 'ckpt.trainers' has no attribute {name!r}")
