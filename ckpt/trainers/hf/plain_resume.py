"""A Trainer's resume without DeepSpeed: compared before the optimizer's state is loaded.

Source: transformers 5.23 ``trainer.py``: ``train`` loads the weights
(``_load_from_checkpoint``; FSDP's in ``_prepare_for_training``),
``_load_optimizer_and_scheduler`` the optimizer's state when it is made,
``_load_rng_state`` the random states after ``on_train_begin``.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.progress import progress
from ckpt.engine.remedies import Ways
from ckpt.engine.view import EngineView
from ckpt.resuming import continuity, plain
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.request import ResumeRequest
from ckpt.runs.run import open_checkpoint
from ckpt.trainers.hf.trainer_state import loop_of, random_states_name
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class PlainResume:
    """One resume of a Trainer without DeepSpeed.

    ``options``: the Trainer, or its ``ResumeCallback``, whose attributes say what is
    compared and what is to be otherwise.
    """

    def __init__(self, engine: EngineView, options: Any, path: Path, ways: Ways):
        continuity.require_known(options.on_mismatch)
        self.engine, self.path = engine, Path(os.path.abspath(path))
        self.on_mismatch: continuity.OnMismatch = options.on_mismatch
        self.ranks = RankGroup("resume", options.timeout)
        self.began_at = time.monotonic()
        self.comparison: Comparison | None = None
        self.options = LoadOptions(
            names_in(options.override),
            optimizer_states=getattr(options, "load_optimizer_states", True),
            ways=ways,
        )
        if options.renamed:
            raise CheckpointError(
                "renamed is for DeepSpeed, whose partitions have no names; without it the "
                "Trainer loads by names: rename the parameters of the model",
                "unsupported",
            )

    def compare(self, args: Any, scheduler: Any, data: Any, script_groups: Any = None) -> None:
        """Compares with what the manifest notes; every rank calls it.

        ``CheckpointError`` on every rank for another training. One that was written
        without ckpt notes nothing.
        """
        with self.ranks.step() as results:
            source = plain.point_of(open_checkpoint(self.path))
            remark = plain.other_ranks_line(source, self.ranks.world)
            random_states = self.path / random_states_name(args)
            results.value = remark is not None or random_states.exists()
            if source is not None:
                loop = loop_of(args, scheduler, data)
                self.comparison = Comparison(
                    source, self.engine, self.options, loop=loop, script_groups=script_groups
                )
                self.comparison.require_here(self.on_mismatch)

        with self.ranks.step():
            if not self.ranks.rank:
                self._tell(remark, results.heard)

    def _tell(self, remark: str | None, have_random_states: list[Any]) -> None:
        """Says what differs;
        ``CheckpointError`` where random states of a rank are missing."""
        if remark is not None:
            log.warning("%s: %s", self.path, remark)
        if self.comparison is not None:
            self.comparison.say()
        if all(have_random_states):
            return

        finding = (
            f"{self.path} has no random states of rank {have_random_states.index(False)} that the "
            "Trainer reads"
        )
        if self.on_mismatch == "error":
            remedy = f"bring them back, or {self.options.ways.mismatch} to go on anyway"
            raise CheckpointError(f"{finding}; {remedy}", "incomplete")
        log.warning("%s: random states are not as they were saved", finding)

    def finish(self, step: int) -> None:
        """Applies overridden options when all is loaded,
        and logs the table; every rank calls it.

        ``step``: where the training stands, 0 if it does not say so yet.
        """
        comparison = self.comparison
        if comparison is None:
            return

        with self.ranks.step():
            comparison.apply()
        request = ResumeRequest(
            ranks=self.ranks,
            path=self.path,
            on_mismatch=self.on_mismatch,
            options=self.options,
            began_at=self.began_at,
        )
        with request.finishing(comparison.source) as report:
            current = {**progress(self.engine), "global_steps": step}
            report.rows = comparison.rows(current, () if step else ("global_steps",))
