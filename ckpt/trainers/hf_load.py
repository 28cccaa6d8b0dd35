"""How the Hugging Face Trainer loads a checkpoint: one that fits, and mapped instead of read.

Source: transformers 5.23 ``trainer.py``: ``train`` is given the checkpoint,
``_prepare_for_training`` makes the engine and calls ``deepspeed_load_checkpoint``,
``_load_rng_state`` reads beside it, ``_load_best_model`` loads the best one at the end.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.saving import reading, topology
from ckpt.saving.layout import Layout
from ckpt.saving.topology import Reshard

BY_ATTRIBUTE = 'or set reshard = "auto" in the class of the Trainer'
module: Any = import_module("transformers.trainer")
last_checkpoint: Any = get_last_checkpoint
BY_FIND = 'or pass reshard="auto" to ckpt.find'


class MappedCheckpoints(Trainer):
    """A Trainer whose resume takes no memory but for what stays.

    It goes on from what loads on these ranks in this stage: ``reshard`` is that of ``ckpt.resume``.
    """

    reshard: Reshard = None
    timeout: float = TIMEOUT

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; all that it reads of the checkpoint is from the one that fits."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, (str, Path)) and self.is_deepspeed_enabled:
            resume_from_checkpoint = self._loadable(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _loadable(self, checkpoint: str | Path) -> str:
        """The checkpoint or, if that does not fit, what it is resharded to; every rank calls it."""
        ranks = Ranks("train", self.timeout)
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if (config.get("checkpoint") or {}).get("load_universal"):
            return str(checkpoint)
        model: Any = self.model
        init = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        layout = Layout.of_config(config, ranks.world, init)
        if layout is None:
            return str(checkpoint)
        path = Path(checkpoint).absolute()
        found = topology.loadable(ranks, path, layout, self.reshard, BY_ATTRIBUTE)
        return str(checkpoint) if found == path else str(found)

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
        best: Any = self.state.best_model_checkpoint
        with ExitStack() as loaded:
            if self.is_deepspeed_enabled:
                loaded.enter_context(reading.mapped(self.model_wrapped))
                self.state.best_model_checkpoint = self._loadable(best)
            try:
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best


class Watch:
    """Looks at what a Trainer of any class loads, for as long as this object lives.

    Callbacks hear of a checkpoint only when it is loaded, or DeepSpeed has failed to. So the call
    of ``deepspeed_load_checkpoint`` in ``transformers.trainer`` goes through here while somebody
    watches: what does not fit is refused by name before DeepSpeed sees it, and files are mapped.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        if not hasattr(module, "deepspeed_load_checkpoint"):
            return  # another version, whose call is not known
        if not _watches:
            _watches.stock = module.deepspeed_load_checkpoint
            module.deepspeed_load_checkpoint = _load
        _watches.append(weakref.ref(self, _watches.forget))


class _Watches(list[Any]):
    """Those that live, the newest last."""

    stock: Any = None

    def forget(self, dead: Any) -> None:
        """Without any, transformers' own is back."""
        self.remove(dead)
        if not self and module.deepspeed_load_checkpoint is _load:
            module.deepspeed_load_checkpoint = self.stock


_watches = _Watches()


def _load(engine: Any, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
    """``deepspeed_load_checkpoint`` of a checkpoint that loads here; else ``CheckpointError``."""
    watch = _watches[-1]() if _watches else None
    ours = isinstance(engine.checkpoint_engine, reading.Mapped)  # seen to already
    if watch is None or ours or engine.load_universal_checkpoint():
        return _watches.stock(engine, checkpoint_path, *args, **options)
    ranks = Ranks("train", watch.timeout)
    layout = Layout.of_engine(engine, ranks.world)
    topology.loadable(ranks, Path(checkpoint_path).absolute(), layout, None, BY_FIND)
    with reading.mapped(engine):
        return _watches.stock(engine, checkpoint_path, *args, **options)
