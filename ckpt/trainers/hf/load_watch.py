"""Looks at what any Trainer loads before DeepSpeed sees it, for callbacks.

Source: transformers 5.23 ``trainer.py``: ``_prepare_for_training`` makes the engine and
calls ``deepspeed_load_checkpoint``, which the module has by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine import mapped_loading
from ckpt.engine.layout import Layout
from ckpt.engine.remedies import Ways
from ckpt.engine.view import EngineView, loads_universal
from ckpt.resuming import topology
from converters.errors import CheckpointError

module: Any = import_module("transformers.trainer")
WAYS = Ways(
    'pass on_mismatch="warn" to ResumeCallback',
    "put CommittedCheckpoints among the Trainer's bases, with load_optimizer_states = False,",
    None,
)
BY_FIND = 'or pass reshard="auto" to ckpt.find'


class LoadWatch:
    """Looks at what a Trainer of any class loads, for as long as this object lives.

    Callbacks hear of a checkpoint only when it is loaded, or DeepSpeed has failed to.
    So the call of ``deepspeed_load_checkpoint`` in ``transformers.trainer`` goes
    through here while somebody watches: what does not fit is refused by name before
    DeepSpeed sees it, and files are mapped.
    """

    def __init__(self, timeout: float, renamed: Mapping[str, str] | None = None):
        self.timeout, self.renamed = timeout, renamed
        self.loaded: Path | None = None  # the checkpoint that was loaded last
        if not hasattr(module, "deepspeed_load_checkpoint"):
            return  # another version, whose call is not known
        if not _watches:
            _watches.stock = module.deepspeed_load_checkpoint
            module.deepspeed_load_checkpoint = _load
        _watches.append(weakref.ref(self, _watches.forget))


class _Watches(list[Any]):
    """The watches that live, the newest last."""

    stock: Any = None

    def forget(self, reference: Any) -> None:
        """Takes a watch out; the last one puts transformers' own function back."""
        self.remove(reference)
        if not self and module.deepspeed_load_checkpoint is _load:
            module.deepspeed_load_checkpoint = self.stock


_watches = _Watches()


def _load(engine: EngineView, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
    """``deepspeed_load_checkpoint`` of a checkpoint
    that loads here; else ``CheckpointError``."""
    watch = _watches[-1]() if _watches else None
    # seen to already
    is_mapped = mapped_loading.is_mapped(engine)
    if watch is None or is_mapped or loads_universal(engine):
        return _watches.stock(engine, checkpoint_path, *args, **options)

    ranks = RankGroup("train", watch.timeout)
    layout = Layout.of_engine(engine, ranks.world)
    folder = Path(checkpoint_path).absolute()
    loadable_folder = topology.loadable(ranks, folder, layout, None, BY_FIND)
    # the Trainer has read the rest of the other one by now
    if loadable_folder != folder:
        raise CheckpointError(
            f"{folder} does not load on these ranks in this stage, {loadable_folder} "
            "does, which was made of it: resume from that by name, or from what "
            "ckpt.find returns",
            "refused",
        )

    watches = (reference() for reference in _watches)
    live_watches = [live_watch for live_watch in watches if live_watch is not None]
    for live_watch in live_watches:
        live_watch.loaded = folder
    renamed = {
        saved_name: new_name
        for live_watch in live_watches
        for saved_name, new_name in (live_watch.renamed or {}).items()
    }
    with mapped_loading.mapped(engine, renamed=renamed, ways=WAYS):
        return _watches.stock(engine, checkpoint_path, *args, **options)
