"""Lightning's DeepSpeed strategy with checkpoints that are whole or absent.

    trainer = Trainer(strategy=ckpt.trainers.lightning.DeepSpeedStrategy(stage=3), ...)

Everything else is as before: ``ModelCheckpoint`` says when and under which names, and which to
delete. Saves are written aside and take the name that was asked for when every rank's files are on
disk; ``last.ckpt``, rewritten each time, is exchanged in one step. The folder gets ``latest`` and
``best`` (a ModelCheckpoint's), which the command line reads. Lightning itself saves no random
states; here they are saved, and set again when a training goes on.

Source: Lightning 2.6.6 ``pytorch/strategies/deepspeed.py``, ``callbacks/model_checkpoint.py``. The
older package ``pytorch_lightning`` is used where it is the one that is imported already, or the
only one there is.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs import liveness, locks, manifest
from ckpt.runs.lease import Lease
from ckpt.runs.pruning import delete
from ckpt.runs.run import POINTERS, Run, open_checkpoint, order
from ckpt.saving import extras, identity, nodes, plain, reading, rng, topology
from ckpt.saving.commit import Commit, Facts
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.layout import Layout
from ckpt.saving.nodes import Nodes
from ckpt.saving.progress import metrics, record, versions
from ckpt.saving.publish import publish
from ckpt.saving.topology import Reshard
from ckpt.trainers.aside import aside
from ckpt.trainers.lightning_resume import Resumed, loop_of, request_of
from converters.errors import CheckpointError

BY_ARGUMENT = f"{topology.BY_ARGUMENT} to the strategy"
TAG = "checkpoint"  # the strategy's, for every checkpoint
log = logging.getLogger("ckpt")


def _stock() -> Any:
    old, new = "pytorch_lightning", "lightning.pytorch"
    is_old = old in sys.modules and new not in sys.modules
    is_only = find_spec("lightning") is None and find_spec(old) is not None
    return import_module(f"{old if is_old or is_only else new}.strategies").DeepSpeedStrategy


Stock: Any = _stock()


class DeepSpeedStrategy(Stock):
    """Lightning's strategy of that name, with the same arguments and these:

    - ``on_mismatch``: "error" stops on every rank, before anything is loaded, where a fit that goes
      on is not as it was saved; "warn" only says so
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as this
      training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_optimizer_states``: ``False`` begins with a new optimizer, from the fp32 masters
    - ``reshard="auto"``: a checkpoint of another world size or ZeRO stage is resharded beside it,
      once, and that is loaded; without, the error says the command
    - ``load_foreign``: whether to load a checkpoint without a manifest from a folder where others
      have one, though it does not prove to be whole
    - ``absent_after``: seconds without a sign of life until a rank counts as absent
    """

    def __init__(
        self,
        *args: Any,
        on_mismatch: OnMismatch = "error",
        override: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        load_optimizer_states: bool = True,
        load_foreign: bool = False,
        reshard: Reshard = None,
        absent_after: float = TIMEOUT,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        topology.require_known(reshard)
        self._on_mismatch, self._reshard = on_mismatch, reshard
        self._request = request_of(on_mismatch, override, renamed, load_optimizer_states)
        self._resumed: Resumed | None = None  # when a fit goes on
        self._load_foreign, self._absent_after = load_foreign, absent_after
        self._nodes: dict[Path, Nodes] = {}  # by the folder that checkpoints are saved into
        self._leases: dict[Path, Lease] = {}  # of those, while a training goes on
        self._random: dict[str, Any] | None = None  # to be set when a training goes on

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """As Lightning's, under the same name, committed; every rank calls it.

        ``CheckpointError`` on every rank if one fails; what had that name before is untouched.
        """
        filepath = self.broadcast(filepath)
        if _is_remote(filepath):
            raise CheckpointError(
                f"{filepath}: DeepSpeed writes to local paths only; set ModelCheckpoint's dirpath "
                "to one",
                "unsupported",
            )
        final = Path(os.path.abspath(filepath))
        engine, trainer = self.deepspeed_engine, self.lightning_module.trainer
        ranks = Ranks("save_checkpoint", self._absent_after)
        place = self._place(ranks, final.parent)
        with ranks.step():
            step = int(checkpoint.get("global_step", engine.global_steps))
            stage = int(engine.zero_optimization_stage())
            said = metrics(trainer.callback_metrics)
            line = identity.line_of(engine, final.parent)
            noted = record(engine, None, loop_of(trainer))
            facts = Facts(step, TAG, line, "full", stage, versions(), said, noted)
        commit = Commit(ranks, place, final, facts)
        with aside(commit, [engine]) as folder:
            super().save_checkpoint(checkpoint, str(folder), storage_options)
            commit.files |= extras.write(folder, ranks.rank, None)
        if place.commits:
            publish(final.parent, None, final, commit.line)
            _point_best(Run(final.parent), trainer)

    def _place(self, ranks: Ranks, run: Path) -> Nodes:
        """Who shares a folder that checkpoints are saved into; from now on no other job does."""
        engine = self.deepspeed_engine
        if run not in self._nodes:
            self._nodes[run] = nodes.find(ranks, run, nodes.local_storage(engine))
            if self._nodes[run].commits:
                identity.warn_of_others(run, identity.line_of(engine, run))
        if run not in self._leases:
            self._leases[run] = nodes.hold(ranks, self._nodes[run], run)
        return self._nodes[run]

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, from a checkpoint that is whole; every rank calls it.

        ``CheckpointError`` on every rank, which names the newest whole one, for one that is not.
        """
        options = {} if weights_only is None else {"weights_only": weights_only}
        path = Path(os.path.abspath(checkpoint_path))
        consolidated = self.load_full_weights and self.zero_stage_3
        if consolidated or _is_remote(checkpoint_path) or not path.is_dir():
            state: dict[str, Any] = super().load_checkpoint(checkpoint_path, **options)
            return state
        ranks = Ranks("load_checkpoint", self._absent_after)
        with ranks.step() as step:
            lock = locks.reading(path)  # against a prune meanwhile
            step.value = str(path)
            if not _require_whole(path, self._load_foreign) and not ranks.rank:
                log.warning("%s has no manifest: nobody knows whether its save finished", path)
        with ranks.step():
            _require_same(step.heard)
        engine, trainer = self.deepspeed_engine, self.lightning_module.trainer
        fits = trainer.state.fn == "fit"  # else no optimizer is loaded
        if fits and not engine.load_universal_checkpoint():
            layout = Layout.of_engine(engine, ranks.world)
            path = topology.loadable(ranks, path, layout, self._reshard, BY_ARGUMENT)
        with ranks.step():
            held = path / rng.NAME.format(ranks.rank)
            found: dict[str, Any] | None = plain.loads(held) if held.exists() else None
            resumed = Resumed.of(path, trainer, self._request)
            if resumed is not None:
                resumed.require(engine, self._on_mismatch)
        with lock:
            with resumed.loading(engine) if resumed else reading.mapped(engine) as reader:
                state = super().load_checkpoint(str(path), **options)
                reader.detach(state)
            if resumed is not None:
                resumed.finish(ranks, self._on_mismatch, reader)
        if fits:
            identity.line_after(engine, path, int(engine.global_steps))
        self._resumed = resumed
        if found is not None and self.lightning_module.trainer.state.fn == "fit":
            self._random = found
            for absent in rng.restore(found):
                log.warning("%s: not set: %s", path, absent)
        return state

    def on_train_start(self) -> None:
        """Takes the folders that checkpoints go into. Sets random states as of the save once more:
        loaders that started meanwhile have drawn; and overridden options, for the schedulers are
        loaded by now.
        """
        super().on_train_start()
        ranks = Ranks("on_train_start", self._absent_after)
        for folder in _folders(self.lightning_module.trainer):
            self._place(ranks, folder)
        if self._resumed is not None:
            self._resumed.override()
            self._resumed = None
        state, self._random = self._random, None
        loop = self.lightning_module.trainer.fit_loop
        began = loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch
        if state is not None and began:
            rng.restore(state)

    def teardown(self) -> None:
        """Gives the folders up."""
        super().teardown()
        for held in self._leases.values():
            held.release()
        self._leases.clear()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Deletes a checkpoint by way of the trash, unless it is pinned or being read."""
        if _is_remote(filepath):
            super().remove_checkpoint(filepath)
            return
        path = Path(os.path.abspath(filepath))
        place = self._nodes.get(path.parent)
        if place.commits if place is not None else self.is_global_zero:
            try:
                _remove(path)
            except (OSError, CheckpointError) as error:
                log.warning("%s stays: %s", path, error)


def _folders(trainer: Any) -> list[Path]:
    """Where its ModelCheckpoints save to; the same on every rank, which Lightning sees to."""
    paths = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return list(dict.fromkeys(Path(os.path.abspath(p)) for p in paths if p and not _is_remote(p)))


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def _point_best(run: Run, trainer: Any) -> None:
    """``best`` names the best of the first ModelCheckpoint that watches a metric and saves here."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        if not getattr(callback, "monitor", None) or not best or _is_remote(best):
            continue
        path = Path(os.path.abspath(best))
        if path.parent == run.path:
            try:
                run.point("best", open_checkpoint(path))
            except (OSError, CheckpointError) as error:
                log.warning("%s: best is behind: %s", run.path, error)
            return


def _require_whole(path: Path, load_foreign: bool) -> bool:
    """Whether it is; ``False`` if that cannot be known, and the user takes it all the same.

    One that was written without ckpt among committed ones has to prove it.
    """
    found = open_checkpoint(path)
    if found.committed:
        return True
    others = [c for c in Run(path.parent).checkpoints() if c.folder != path]
    ours = any(other.manifest is not None for other in others)
    if found.why == manifest.ABSENT and (load_foreign or not ours):
        return False
    if found.why == manifest.ABSENT:
        with suppress(CheckpointError):  # the reason follows
            if liveness.prove_at_rest(path).resumable:
                return True
    whole = Run(path.parent).newest()
    newest = f"the newest whole one is {whole.folder}" if whole else "none is whole"
    how = "; load_foreign=True loads it all the same" if found.why == manifest.ABSENT else ""
    raise CheckpointError(f"{path} is not whole: {found.why}; {newest}{how}", "incomplete")


def _require_same(paths: list[Any]) -> None:
    """Lightning lets every rank look for itself, by times of change, which is "last"."""
    for rank, path in enumerate(paths):
        if path != paths[0]:
            raise CheckpointError(
                f"rank {rank}: it loads {path}, rank 0 loads {paths[0]}; name one checkpoint",
                "refused",
            )


def _remove(path: Path) -> None:
    """Deletes a checkpoint, or the link to one; first, no pointer names it any more."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    run, checkpoint = Run(path.parent), open_checkpoint(path)
    others = [c for c in run.checkpoints() if c.committed and c.tier == "full"]
    heir = max((c for c in others if not _goes(c.folder, path)), key=order, default=None)
    moved = [
        name
        for name in POINTERS
        if (named := run.pointer(name)) is not None and _goes(named.folder, path)
    ]
    for name in moved:
        run.point(name, heir if name == "latest" else None)
    if path.is_symlink():
        path.unlink()
    elif (why := delete(checkpoint)) is not None:
        log.warning("%s stays: %s; ckpt prune deletes it later", path, why)
        for name in moved:
            run.point(name, checkpoint)


def _goes(folder: Path, path: Path) -> bool:
    """Whether ``folder`` is no checkpoint any more when ``path`` is deleted: links to it too."""
    return folder == path or (not path.is_symlink() and folder.samefile(path))
