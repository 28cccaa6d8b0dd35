"""Lightning's DeepSpeed strategy with checkpoints that are whole or absent.

    trainer = Trainer(strategy=ckpt.trainers.lightning.DeepSpeedStrategy(stage=3), ...)

Everything else is as before: ``ModelCheckpoint`` says when and under which names, and
which to delete. Saves are written aside and take the name that was asked for when every
rank's files are on disk; ``last.ckpt``, rewritten each time, is exchanged in one step.
The folder gets ``latest`` and ``best`` (a ModelCheckpoint's), which the command line
reads. Lightning itself saves no random states; here they are saved, and set again when
a training goes on.

Source: Lightning 2.6.6 ``pytorch/strategies/deepspeed.py``,
``callbacks/model_checkpoint.py``. The older package ``pytorch_lightning`` is used where
it is the one that is imported already, or the only one there is.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckpt import requirements


def _package_of_strategies() -> str:
    old_package, new_package = "pytorch_lightning", "lightning.pytorch"
    is_old = old_package in sys.modules and new_package not in sys.modules
    is_only = find_spec("lightning") is None and find_spec(old_package) is not None
    return old_package if is_old or is_only else new_package


_PACKAGE = _package_of_strategies()
requirements.require("ckpt.trainers.lightning", _PACKAGE.partition(".")[0], "deepspeed")

from ckpt.distributed.ranks import TIMEOUT, RankGroup
from ckpt.engine import mapped_loading
from ckpt.engine.layout import Layout
from ckpt.engine.view import loads_universal, uses_node_local_storage
from ckpt.folders import locks
from ckpt.resuming import topology
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.topology import Reshard
from ckpt.runs.run import Run
from ckpt.saving.commit import identity
from ckpt.saving.front_end import RunFolder, SaveDetails, describe
from ckpt.state import plain, rng
from ckpt.trainers.lightning_folders import (
    checkpoint_folders,
    is_remote,
    point_best,
    remove,
    require_whole,
)
from ckpt.trainers.lightning_resume import FitResume, loop_of, request_of
from converters.errors import CheckpointError

BY_ARGUMENT = f"{topology.BY_ARGUMENT} to the strategy"
TAG = "checkpoint"  # the strategy's, for every checkpoint
log = logging.getLogger("ckpt")


Stock: Any = import_module(f"{_PACKAGE}.strategies").DeepSpeedStrategy


class DeepSpeedStrategy(Stock):
    """Lightning's strategy of that name, which takes the same arguments and more.

    - ``on_mismatch``: "error" stops on every rank, before anything is loaded, where a
      fit that goes on is not as it was saved; "warn" only says so
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as
      this training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_optimizer_states``: ``False`` begins with a new optimizer, from the fp32
      masters
    - ``reshard="auto"``: a checkpoint of another world size or ZeRO stage is resharded
      beside it, once, and that is loaded; without, the error says the command
    - ``load_foreign``: whether to load a checkpoint without a manifest though it does
      not prove to be whole
    - ``committed_only``: whether to refuse what has no manifest, also where it proves to
      be whole
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
        committed_only: bool = False,
        reshard: Reshard = None,
        absent_after: float = TIMEOUT,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        topology.require_known(reshard)
        self._on_mismatch, self._reshard = on_mismatch, reshard
        self._request = request_of(on_mismatch, override, renamed, load_optimizer_states)
        self._resumed: FitResume | None = None  # when a fit goes on
        self._load_foreign, self._committed_only = load_foreign, committed_only
        self._absent_after = absent_after
        # by their paths, those that checkpoints are saved into
        self._run_folders: dict[Path, RunFolder] = {}
        self._held_folders: set[Path] = set()  # of those, while a training goes on
        self._random: dict[str, Any] | None = None  # to be set when a training goes on

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Saves as Lightning does, under the same name,
        and commits; every rank calls it.

        ``CheckpointError`` on every rank if one fails; what had that name before is
        untouched.
        """
        filepath = self.broadcast(filepath)
        if is_remote(filepath):
            raise CheckpointError(
                f"{filepath}: DeepSpeed writes to local paths only; set "
                "ModelCheckpoint's dirpath to one",
                "unsupported",
            )

        final = Path(os.path.abspath(filepath))
        engine, trainer = self.deepspeed_engine, self.lightning_module.trainer
        ranks = RankGroup("save_checkpoint", self._absent_after)
        run_folder = self._run_folder(ranks, final.parent)

        with ranks.step():
            details = SaveDetails(
                step=int(checkpoint.get("global_step", engine.global_steps)),
                tag=TAG,
                metrics=trainer.callback_metrics,
                loop=loop_of(trainer),
            )
            facts = describe(engine, details, run_folder.line_of(engine))

        with run_folder.saving(ranks, final.name, facts, [engine]) as save:
            super().save_checkpoint(checkpoint, str(save.folder), storage_options)
            save.write_rank_files()

        run_folder.publish(None, final, save.line)
        if run_folder.commits:
            point_best(Run(final.parent), trainer)

    def _run_folder(self, ranks: RankGroup, path: Path) -> RunFolder:
        """A folder that checkpoints are saved into; from now on no other job does."""
        engine = self.deepspeed_engine
        if path not in self._run_folders:
            run_folder = RunFolder.find(ranks, path, uses_node_local_storage(engine))
            self._run_folders[path] = run_folder
            if run_folder.commits:
                run_folder.warn_of_others(run_folder.line_of(engine))

        run_folder = self._run_folders[path]
        if path not in self._held_folders:
            run_folder.hold(ranks)
            self._held_folders.add(path)
        return run_folder

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads as Lightning does, from a checkpoint that is whole; every rank calls it.

        ``CheckpointError`` on every rank, which names the newest whole one, for one
        that is not.
        """
        options = {} if weights_only is None else {"weights_only": weights_only}
        path = Path(os.path.abspath(checkpoint_path))
        consolidated = self.load_full_weights and self.zero_stage_3
        if consolidated or is_remote(checkpoint_path) or not path.is_dir():
            state: dict[str, Any] = super().load_checkpoint(checkpoint_path, **options)
            return state

        ranks = RankGroup("load_checkpoint", self._absent_after)
        lock = self._lock(ranks, path)
        engine, trainer = self.deepspeed_engine, self.lightning_module.trainer
        is_fit = trainer.state.fn == "fit"  # else no optimizer is loaded
        if is_fit and not loads_universal(engine):
            path = self._loadable(ranks, path)

        with ranks.step():
            random_states = _read_random_states(path, ranks.rank)
            resumed = FitResume.of(path, trainer, self._request)
            if resumed is not None:
                resumed.require(engine, self._on_mismatch)

        with lock:
            mapped = resumed.loading(engine) if resumed else mapped_loading.mapped(engine)
            with mapped as reader:
                state = super().load_checkpoint(str(path), **options)
                reader.detach(state)
            if resumed is not None:
                resumed.finish(ranks, self._on_mismatch, reader)

        self._resumed = resumed
        if is_fit:
            identity.line_after(engine, path, int(engine.global_steps))
            self._restore_random_states(path, random_states)

        return state

    def _lock(self, ranks: RankGroup, path: Path) -> locks.Lock:
        """A lock on ``path`` against a prune meanwhile.

        ``CheckpointError`` if the checkpoint is not whole, or ranks load different ones.
        """
        with ranks.step() as paths:
            lock = locks.reading(path)
            paths.value = str(path)
            require_whole(
                path,
                load_foreign=self._load_foreign,
                committed_only=self._committed_only,
                says=not ranks.rank,
            )

        with ranks.step():
            _require_same(paths.heard)
        return lock

    def _loadable(self, ranks: RankGroup, path: Path) -> Path:
        """``path``, or its resharding for these ranks;
        ``CheckpointError`` if neither loads."""
        layout = Layout.of_engine(self.deepspeed_engine, ranks.world)
        return topology.loadable(ranks, path, layout, self._reshard, BY_ARGUMENT)

    def _restore_random_states(self, path: Path, random_states: dict[str, Any] | None) -> None:
        """Sets the random states of ``path``, and keeps them for ``on_train_start``.

        Logs a warning for each that cannot be set here.
        """
        if random_states is None:
            return

        self._random = random_states
        for missing_part in rng.restore(random_states):
            log.warning("%s: could not set %s", path, missing_part)

    def on_train_start(self) -> None:
        """Takes the folders that checkpoints go into, before the first step.

        Where a training goes on, it also sets the random states of the save once more,
        because loaders that started meanwhile have drawn from them, and the overridden
        options, because the schedulers are loaded by now.
        """
        super().on_train_start()
        ranks = RankGroup("on_train_start", self._absent_after)
        for folder in checkpoint_folders(self.lightning_module.trainer):
            self._run_folder(ranks, folder)
        if self._resumed is not None:
            self._resumed.override()
            self._resumed = None

        random_states, self._random = self._random, None
        loop = self.lightning_module.trainer.fit_loop
        batches = loop.epoch_loop.batch_progress
        is_mid_epoch = loop.restarted_mid_epoch and not batches.is_last_batch
        if random_states is not None and is_mid_epoch:
            rng.restore(random_states)

    def teardown(self) -> None:
        """Gives the folders up."""
        super().teardown()
        for path in self._held_folders:
            self._run_folders[path].release()
        self._held_folders.clear()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Deletes a checkpoint by way of the trash, unless it is pinned or being read."""
        if is_remote(filepath):
            super().remove_checkpoint(filepath)
            return

        path = Path(os.path.abspath(filepath))
        run_folder = self._run_folders.get(path.parent)
        deletes = self.is_global_zero
        if run_folder is not None:
            deletes = run_folder.commits
        if deletes:
            try:
                remove(path)
            except (OSError, CheckpointError) as error:
                log.warning("%s stays: %s", path, error)


def _read_random_states(folder: Path, rank: int) -> dict[str, Any] | None:
    """The random states that ``rank`` saved in ``folder``; ``None`` if it saved none."""
    path = folder / rng.NAME.format(rank)
    if not path.exists():
        return None

    states: dict[str, Any] = plain.loads(path)
    return states


def _require_same(paths: list[Any]) -> None:
    """``CheckpointError`` if ranks load different checkpoints.

    Lightning lets every rank look for itself, by times of change, which is "last".
    """
    for rank, path in enumerate(paths):
        if path != paths[0]:
            raise CheckpointError(
                f"rank {rank}: it loads {path}, rank 0 loads {paths[0]}; name one checkpoint",
                "refused",
            )
