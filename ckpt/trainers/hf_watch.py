"""What any Trainer loads, looked at before DeepSpeed sees it, for callbacks.

Source: transformers 5.23 ``trainer.py``: ``_prepare_for_training`` makes the engine and calls
``deepspeed_load_checkpoint``, which the module has by name.
"""

from __future__ import annotations

import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.saving import reading, topology
from ckpt.saving.layout import Layout

module: Any = import_module("transformers.trainer")
BY_FIND = 'or pass reshard="auto" to ckpt.find'


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
