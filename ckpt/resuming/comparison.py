"""A resume that looks at what differs before the engine is touched,
and gives back what was asked.

    comparison = Comparison(source, engine, request)
    comparison.require(ranks, on_mismatch)      every rank; nothing is loaded yet
    ...                                         the load
    comparison.apply()                          overridden options, and what another class lacks
    rows = comparison.rows(now)                 counters as noted and as they are, and the settings

A manifest of an older ckpt notes less; then only what it notes is compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine import optimizers, precision, view
from ckpt.engine.mapped_loading import Mapped
from ckpt.engine.progress import progress, settings_in, whole_micro_steps
from ckpt.engine.settings import ENGINE_ALONE, Loop, config_of, describe
from ckpt.engine.view import EngineView
from ckpt.resuming import continuity
from ckpt.resuming.changes import Change, LoadOptions, changes
from ckpt.resuming.continuity import OnMismatch, Row
from ckpt.resuming.resume_point import ResumePoint
from converters.errors import CheckpointError
from converters.words import more

log = logging.getLogger("ckpt")


class Comparison:
    """Compares the notes in ``source`` with the training of ``engine``,
    which has not loaded it.

    ``script_groups``: the options of param groups that the script gave, where they are
    not those of the optimizer any more.
    """

    def __init__(
        self,
        source: ResumePoint,
        engine: EngineView,
        request: LoadOptions,
        *,
        loop: Loop = ENGINE_ALONE,
        script_groups: Sequence[Mapping[str, Any]] | None = None,
    ):
        is_resharded = source.manifest is not None and source.manifest.is_derived
        request = replace(request, other_ranks=is_resharded)
        self.source, self.engine, self.request = source, engine, request
        self.scheduler = loop.scheduler or view.scheduler(engine)
        self.optimizer = optimizers.inner(engine)
        self.progress = dict(source.progress or {})
        self.saved = settings_in(self.progress)
        self.current = describe(engine, loop)
        if script_groups is not None and self.current["optimizer"] is not None:
            self.current["optimizer"]["groups"] = optimizers.options(script_groups)
        self.script_groups = script_groups or (
            optimizers.given(self.optimizer) if self.optimizer else []
        )
        if request.override:
            optimizers.require_known(request.override, self.script_groups)
        self.changes: list[Change] = changes(self.saved, self.current, request)
        if not self.saved and not request.weights_alone:
            self.changes += _of_batch(self.progress, self.current)
        if not request.weights_alone:
            self.changes += _of_accumulation(self.progress, self.current)

    def require(self, ranks: RankGroup, on_mismatch: OnMismatch) -> None:
        """``CheckpointError`` on every rank
        if what would be loaded is not this training's."""
        with ranks.step():
            self.require_here(on_mismatch)
        if not ranks.rank:
            self.say()

    def require_here(self, on_mismatch: OnMismatch) -> None:
        """``require`` on this rank alone."""
        new_optimizer = not self.request.optimizer_states
        if new_optimizer and view.offloads_optimizer_to_nvme(self.engine):
            raise CheckpointError(
                "the optimizer is offloaded to NVMe, where DeepSpeed loads all "
                "states or none; convert the checkpoint (ckpt to-fp32) and load the "
                "weights into the model",
                "unsupported",
            )

        wrong_changes = [change for change in self.changes if change.effect == "wrong"]
        if wrong_changes:
            and_more = more(len(wrong_changes) + len(self._refused) - 1)
            raise CheckpointError(
                f"{self.source.folder}: {wrong_changes[0].line}{and_more}", "refused"
            )

        if self._refused and on_mismatch == "error":
            lines = [change.line for change in self._refused]
            raise CheckpointError(self.refusal(lines), "refused")

    def refusal(self, lines: Sequence[str]) -> str:
        """The error for a training that is not as it was saved."""
        return (
            f"{self.source.folder}: the training is not as it was saved: "
            f"{'; '.join(lines[:3])}{more(len(lines) - 3)}; give it what it was "
            f"saved with, or {self.request.ways.mismatch} to go on anyway"
        )

    @property
    def _refused(self) -> list[Change]:
        return [change for change in self.changes if change.effect == "refused"]

    def say(self) -> None:
        """Logs a warning for each difference that the training goes on with."""
        for change in self.changes:
            log.warning("%s: %s", self.source.folder, change.line)

    def apply(self) -> None:
        """Sets what DeepSpeed does not load, after the load.

        These are micro steps, what another class of optimizer lacks, and overridden
        options.
        """
        self.source.go_on(self.engine, self.current["batch"])
        if self.optimizer is None:
            return

        if self.request.optimizer_states:
            optimizers.complete(self.optimizer, self.script_groups)
        if self.scheduler is not None and not self.request.scheduler_states:
            optimizers.restart_rates(self.optimizer, self.script_groups)
        elif self.scheduler is not None and not self.request.optimizer_states:
            # A scheduler sets them after a step, not when it is loaded.
            optimizers.set_rates(self.optimizer, self.progress.get("lr") or ())

        if self.request.override:
            names = self.request.override
            groups = self.script_groups
            optimizers.override(self.optimizer, self.scheduler, groups, names)

    def rows_after(self, reader: Mapped, epoch: Any = None) -> list[Row]:
        """``rows`` of what stands in the engine now that ``reader`` has loaded it."""
        current = progress(self.engine, epoch)
        return self.rows(current, reader.new_counters, reader.config)

    def rows(
        self,
        current: Mapping[str, Any],
        omitted_names: Sequence[str] = (),
        saved_config: Any = None,
    ) -> list[Row]:
        """Counters as they were noted and as they are in ``current``, then the settings.

        ``saved_config``: DeepSpeed's out of the files, for a manifest that has no
        settings.
        """
        saved_progress = dict(self.progress)
        if "micro_steps" in saved_progress:
            micro_steps = whole_micro_steps(saved_progress, self.current["batch"])
            saved_progress["micro_steps"] = micro_steps

        compared_already = ("config",) if self.saved or saved_config is None else ()
        omitted_names = (
            *omitted_names,
            *self._own_names,
            "settings",
            "train_batch_size",
            *compared_already,
        )
        configs = precision.unsaid((saved_config, config_of(self.engine) or None))
        differing = {change.name for change in self.changes}

        return [
            *continuity.compare(saved_progress, current, configs, omitted_names),
            *continuity.settings_rows(self.saved, self.current, differing),
        ]

    @property
    def _own_names(self) -> list[str]:
        """What of the progress this training has by itself, and not from the checkpoint."""
        names = [] if self.request.optimizer_states else ["loss_scale", "optimizer_step"]
        loads_scheduler = self.scheduler is not None and self.request.scheduler_states
        lr_comes_back = loads_scheduler or (
            self.request.optimizer_states and self.scheduler is None
        )
        if not lr_comes_back or optimizers.LR in self.request.override:
            names.append("lr")
        return names


def _of_batch(progress: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The samples of a step, of which an older manifest has the product."""
    saved_size = progress.get("train_batch_size")
    current_size = current["batch"].get("train_batch_size")
    if saved_size is None or current_size is None or saved_size == current_size:
        return []
    name = "train_batch_size"
    return [Change(name, "refused", f"{name}: {saved_size} saved, {current_size} now")]


def _of_accumulation(
    progress: Mapping[str, Any],
    current: Mapping[str, Any],
) -> list[Change]:
    """A save in the middle of a step: its gradients are in no checkpoint."""
    batch = settings_in(progress).get("batch") or current["batch"]
    micro_batches = progress.get("micro_batches_lost")
    if not micro_batches:
        micro_batches = progress.get("micro_steps", 0) % batch["micro_steps"]
    if not micro_batches:
        return []

    count = batch.get("gradient_accumulation_steps", 1)
    line = (
        f"micro_steps: it was saved {micro_batches} of {count} micro batches into a "
        "step, whose gradients are in no checkpoint; the training goes on from the "
        "whole step before"
    )
    return [Change("micro_steps", "kept", line)]
