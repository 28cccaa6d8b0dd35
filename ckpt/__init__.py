"""DeepSpeed ZeRO checkpoints: managed while training, and turned into weights."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"
__all__ = [
    "CheckpointError",
    "Preemption",
    "Push",
    "Retention",
    "Saver",
    "__version__",
    "find",
    "open",
    "resume",
]

_HOMES = {
    "CheckpointError": "converters.errors",
    "Preemption": "ckpt.saving.preemption",
    "Push": "ckpt.hub.background",
    "Retention": "ckpt.runs.retention",
    "Saver": "ckpt.saving.saver",
    "find": "ckpt.saving.choosing",
    "open": "ckpt.opened",
    "resume": "ckpt.saving.resume",
}


def __getattr__(name: str) -> Any:
    """What is loaded when it is first used, so that ``ckpt --help`` stays instant."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    if name in ("live", "trainers"):
        from importlib import import_module

        return import_module(f"ckpt.{name}")
    raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
