"""The Hugging Face Trainer reading a checkpoint's files as maps, not into memory (``reading``).

Source: transformers 5.23 ``trainer.py``: ``_prepare_for_training`` makes the engine and loads the
checkpoint that training goes on from, ``_load_best_model`` the best one at the end.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import Trainer

from ckpt.saving import reading


class MappedCheckpoints(Trainer):
    """A Trainer whose resume takes no memory but for what stays."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()._prepare_for_training
        if not self.is_deepspeed_enabled:
            return stock(*args, **kwargs)
        prepare = self.accelerator.prepare
        with ExitStack() as loaded:

            def prepared(*given: Any, **options: Any) -> Any:
                made = prepare(*given, **options)
                for engine in made if isinstance(made, tuple) else (made,):
                    if hasattr(engine, "checkpoint_engine"):
                        loaded.enter_context(reading.mapped(engine))
                return made

            self.accelerator.prepare = prepared
            try:
                return stock(*args, **kwargs)
            finally:
                del self.accelerator.prepare

    def _load_best_model(self) -> None:
        with ExitStack() as loaded:
            if self.is_deepspeed_enabled:
                loaded.enter_context(reading.mapped(self.model_wrapped))
            super()._load_best_model()
