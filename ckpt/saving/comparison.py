"""A resume that looks at what differs before the engine is touched, and gives back what was asked.

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

from ckpt.ranks import Ranks
from ckpt.saving import continuity, optimizers, precision
from ckpt.saving.changes import Change, Request, changes
from ckpt.saving.continuity import OnMismatch, Row
from ckpt.saving.progress import settings_in, whole_micro_steps
from ckpt.saving.settings import ENGINE_ALONE, Loop, config_of, describe
from ckpt.saving.source import Source
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class Comparison:
    """What was noted in ``source`` against the training of ``engine``, which has not loaded it.

    ``asked``: the options of param groups that the script gave, where they are not those of the
    optimizer any more.
    """

    def __init__(
        self,
        source: Source,
        engine: Any,
        request: Request,
        *,
        loop: Loop = ENGINE_ALONE,
        asked: Sequence[Mapping[str, Any]] | None = None,
    ):
        resharded = source.manifest is not None and source.manifest.made_of is not None
        request = replace(request, other_ranks=resharded)
        self.source, self.engine, self.request = source, engine, request
        self.scheduler = loop.scheduler or getattr(engine, "lr_scheduler", None)
        self.optimizer = optimizers.inner(engine)
        self.noted = dict(source.progress or {})
        self.saved = settings_in(self.noted)
        self.now = describe(engine, loop)
        if asked is not None and self.now["optimizer"] is not None:
            self.now["optimizer"]["groups"] = optimizers.options(asked)
        self.asked = asked or (optimizers.given(self.optimizer) if self.optimizer else [])
        if request.override:
            optimizers.require_known(request.override, self.asked)
        self.changes: list[Change] = changes(self.saved, self.now, request)
        if not self.saved and not request.weights_alone:
            self.changes += _of_batch(self.noted, self.now)
        if not request.weights_alone:
            self.changes += _of_accumulation(self.noted, self.now)

    def require(self, ranks: Ranks, on_mismatch: OnMismatch) -> None:
        """``CheckpointError`` on every rank if what would be loaded is not this training's."""
        with ranks.step():
            self.require_here(on_mismatch)
        if not ranks.rank:
            self.say()

    def require_here(self, on_mismatch: OnMismatch) -> None:
        """``require`` on this rank alone."""
        offloaded = getattr(self.engine, "zero_nvme_offload_optimizer", lambda: False)
        if not self.request.optimizer_states and offloaded():
            raise CheckpointError(
                "the optimizer is offloaded to NVMe, where DeepSpeed loads all states or none; "
                "convert the checkpoint (ckpt to-fp32) and load the weights into the model",
                "unsupported",
            )
        wrong = [change for change in self.changes if change.effect == "wrong"]
        if wrong:
            more = _more(len(wrong) + len(self._refused) - 1)
            raise CheckpointError(f"{self.source.folder}: {wrong[0].line}{more}", "refused")
        if self._refused and on_mismatch == "error":
            lines = [change.line for change in self._refused]
            raise CheckpointError(self.refusal(lines), "refused")

    def refusal(self, lines: Sequence[str]) -> str:
        """What is said of a training that is not as it was saved."""
        return (
            f"{self.source.folder}: the training is not as it was saved: {'; '.join(lines[:3])}"
            f"{_more(len(lines) - 3)}; give it what it was saved with, or "
            f"{self.request.ways.mismatch} to go on all the same"
        )

    @property
    def _refused(self) -> list[Change]:
        return [change for change in self.changes if change.effect == "refused"]

    def say(self) -> None:
        """A warning for each difference that goes on."""
        for change in self.changes:
            log.warning("%s: %s", self.source.folder, change.line)

    def apply(self) -> None:
        """After the load: what DeepSpeed does not load, what another class of optimizer lacks, and
        what was overridden."""
        self.source.go_on(self.engine, self.now["batch"])
        if self.optimizer is None:
            return
        if self.request.optimizer_states:
            optimizers.complete(self.optimizer, self.asked)
        if self.scheduler is not None and not self.request.scheduler_states:
            optimizers.restart_rates(self.optimizer, self.asked)
        elif self.scheduler is not None and not self.request.optimizer_states:
            # A scheduler sets them after a step, not when it is loaded.
            optimizers.set_rates(self.optimizer, self.noted.get("lr") or ())
        if self.request.override:
            names = self.request.override
            optimizers.override(self.optimizer, self.scheduler, self.asked, names)

    def rows(
        self, now: Mapping[str, Any], without: Sequence[str] = (), saved_config: Any = None
    ) -> list[Row]:
        """Counters as they were noted and as they are ``now``, then the settings.

        ``saved_config``: DeepSpeed's out of the files, for a manifest that has no settings.
        """
        noted = dict(self.noted)
        if "micro_steps" in noted:
            noted["micro_steps"] = whole_micro_steps(noted, self.now["batch"])
        said = ("config",) if self.saved or saved_config is None else ()
        without = (*without, *self._own, "settings", "train_batch_size", *said)
        configs = precision.unsaid((saved_config, config_of(self.engine) or None))
        differing = {change.name for change in self.changes}
        return [
            *continuity.compare(noted, now, configs, without),
            *continuity.settings_rows(self.saved, self.now, differing),
        ]

    @property
    def _own(self) -> list[str]:
        """Of the progress: what this training has by itself, and not from the checkpoint."""
        names = [] if self.request.optimizer_states else ["loss_scale", "optimizer_step"]
        loads = self.scheduler is not None and self.request.scheduler_states
        kept = loads or (self.request.optimizer_states and self.scheduler is None)
        if not kept or optimizers.LR in self.request.override:
            names.append("lr")
        return names


def _more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""


def _of_batch(noted: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The samples of a step, of which an older manifest has the product."""
    then, value = noted.get("train_batch_size"), now["batch"].get("train_batch_size")
    if then is None or value is None or then == value:
        return []
    name = "train_batch_size"
    return [Change(name, "refused", f"{name}: {then} saved, {value} now")]


def _of_accumulation(noted: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """A save in the middle of a step: its gradients are in no checkpoint."""
    batch = settings_in(noted).get("batch") or now["batch"]
    done = noted.get("micro_batches_lost") or noted.get("micro_steps", 0) % batch["micro_steps"]
    if not done:
        return []
    count = batch.get("gradient_accumulation_steps", 1)
    line = (
        f"micro_steps: it was saved {done} of {count} micro batches into a step, whose gradients "
        "are in no checkpoint; the training goes on from the whole step before"
    )
    return [Change("micro_steps", "kept", line)]
