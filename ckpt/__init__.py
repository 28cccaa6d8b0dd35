"""DeepSpeed ZeRO checkpoints: managed while training, and turned into weights."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def __getattr__(name: str) -> Any:
    """``ckpt.open``, loaded when it is first used, so that ``ckpt --help`` stays instant."""
    if name == "open":
        from ckpt import opened

        return opened.open
    raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
