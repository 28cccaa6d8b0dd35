"""A training of plain torch goes on from the newest whole checkpoint,
on any number of ranks.

    start = ckpt.resume(model=model, optimizer=optimizer, scheduler=scheduler, run="out")

Every rank calls it once, when model and optimizer are made as for the training. What can
be known is looked at on all ranks before anything is touched; then each reads the bytes
of its part.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ckpt.distributed.ranks import alive
from ckpt.engine.layout import Topology
from ckpt.engine.progress import progress
from ckpt.folders import filenames, locks
from ckpt.resuming import select
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import RankState, ResumePoint
from ckpt.runs.run import RunCheckpoint
from ckpt.saving.commit import identity
from ckpt.saving.torch_states import TRAINING_STATE
from ckpt.state import plain
from ckpt.torch_training import loading
from ckpt.torch_training.saved_states import SavedStates
from ckpt.torch_training.training import TorchTraining
from converters.detect import detect
from converters.detect.filenames import DCP, OPTIMIZERS
from converters.errors import CheckpointError
from converters.storage import open_files
from converters.words import counted, with_article

log = logging.getLogger("ckpt")
# what only the loop of the user knows
_UNKNOWN = ("precision", "batch", "gradient_clipping", "topology", "offload")


@dataclass(slots=True)
class TorchResume:
    """One resume of ``training``; ``strict`` as of ``load_state_dict``."""

    request: ResumeRequest
    training: TorchTraining
    strict: bool = True

    def __call__(self, client_state: MutableMapping[str, Any] | None) -> int:
        """Loads a checkpoint and returns its step; 0 if the run has none yet."""
        request, options = self.request, self.request.options
        ranks = request.ranks
        with ExitStack() as stack:
            source = self._choose(stack)
            if source is None:
                return 0

            with ranks.step(), open_files.once():
                weights_alone = options.weights_alone
                state = RankState.none() if weights_alone else request.state(source)
                shared_state = self._shared_state(source)
                states = SavedStates.read(source.folder, options.renamed)
                with_optimizer = options.optimizer_states
                plan = loading.require_fit(states, self.training, with_optimizer, self.strict)
                comparison = Comparison(source, self.training, options)
                # names and shapes are compared with the files themselves
                comparison.changes = [
                    change for change in comparison.changes if change.name != "parameters"
                ]

            comparison.require(ranks, request.on_mismatch)
            with ranks.step(), alive(ranks), open_files.once():
                self._load(states, plan, comparison, shared_state)

        with request.finishing(source) as report:
            if not weights_alone:
                rows = comparison.rows(progress(self.training))
                report.rows = [row for row in rows if row.name not in _UNKNOWN]
            if client_state is not None and not weights_alone:
                client_state.update(shared_state.get("client_state") or {})
            state.set(request.extra)

        if weights_alone:
            identity.begin(self.training.module)
            return 0
        identity.line_after(self.training.module, source.folder, source.step)
        return source.step

    def _choose(self, stack: ExitStack) -> ResumePoint | None:
        """Chooses the checkpoint to load, which is not deleted while ``stack`` is open;
        ``None``: there is none yet."""
        request, ranks = self.request, self.request.ranks
        checkpoint = select.select_checkpoint(
            ranks,
            request.path,
            request.tag,
            request.verify,
            request.load_foreign,
            deepspeed=False,
            committed_only=request.committed_only,
        )
        if checkpoint is None:
            if not ranks.rank:
                log.info("%s has no checkpoint to go on from yet", request.path)
            return None

        with ranks.step():
            stack.enter_context(locks.reading(checkpoint.folder))
            source = _point(checkpoint, ranks.world)

        if not ranks.rank:
            log.info("going on from %s", source.said(request.verify))
            _tell_of_ranks(source, ranks.world)
        return source

    def _shared_state(self, source: ResumePoint) -> dict[str, Any]:
        """The state that all ranks shared beside the states: the scheduler's,
        and the client state."""
        path = source.folder / TRAINING_STATE
        if source.saved_by_ckpt:
            shared_state: dict[str, Any] = plain.loads(path)
            return shared_state
        if self.training.lr_scheduler is not None and not self.request.ranks.rank:
            log.warning(
                "%s was not saved by ckpt: the scheduler begins at its start", source.folder
            )
        return {}

    def _load(
        self,
        states: SavedStates,
        plan: loading.LoadPlan,
        comparison: Comparison,
        shared_state: dict[str, Any],
    ) -> None:
        options, training = self.request.options, self.training
        loading.load_model(states, plan, self.strict)
        if options.weights_alone:
            return
        if options.optimizer_states and training.optimizer is not None:
            loading.load_optimizer(states, plan)
        scheduler_state = shared_state.get("scheduler")
        if options.scheduler_states and training.lr_scheduler is not None and scheduler_state:
            current_state = training.lr_scheduler.state_dict()
            training.lr_scheduler.load_state_dict(_as_here(scheduler_state, current_state))
        training.global_steps = comparison.source.step
        comparison.apply()


def _as_here(saved: Any, current: Any) -> Any:
    """A state with a Counter where the scheduler here has one: it was saved as a dict."""
    if isinstance(current, Counter) and isinstance(saved, dict):
        return type(current)(saved)
    if isinstance(current, dict) and isinstance(saved, dict):
        return {key: _as_here(value, current.get(key)) for key, value in saved.items()}
    if isinstance(current, list) and isinstance(saved, list) and len(current) == len(saved):
        return [_as_here(*pair) for pair in zip(saved, current, strict=True)]
    return saved


def _point(checkpoint: RunCheckpoint, world: int) -> ResumePoint:
    """A checkpoint as a ``ResumePoint``;
    ``CheckpointError`` for one that is not DCP in one folder."""
    folder, manifest = checkpoint.folder, checkpoint.manifest
    if not (folder / DCP).is_file():
        detection = detect(folder)
        has_numbers = any((folder / name).is_file() for name in OPTIMIZERS)
        remedy = "ckpt to-dcp makes one of it" + ", of the weights alone" * has_numbers
        raise detection.damage or CheckpointError(
            f"{folder} holds {with_article(detection.kind.title)}, and ckpt.resume(model=...) "
            f"loads torch's distributed checkpoints in one folder; {remedy}",
            "unsupported",
        )

    digest = ""
    if manifest is not None:
        data = (folder / filenames.MANIFEST).read_bytes()
        digest = sha256(data).hexdigest()[:12]
    saved_world = world if manifest is None else manifest.world_size
    step = _step(checkpoint)
    topology = Topology(0, saved_world)
    if manifest is None:
        return ResumePoint(folder, "", step, topology)
    record = (manifest.progress, manifest.metrics, manifest)
    return ResumePoint(folder, "", step, topology, digest, *record, resharded=saved_world != world)


def _step(checkpoint: RunCheckpoint) -> int:
    """The step of a checkpoint; ``CheckpointError`` where nothing says it."""
    if checkpoint.manifest is not None:
        return checkpoint.manifest.step

    from converters.dcp import reader

    step = reader.read(checkpoint.folder).step
    if step is None:
        step = checkpoint.step
    if step is None:
        raise CheckpointError(
            f"{checkpoint.folder} does not say its step: no number in its name, and no step beside "
            "the model; name the folder checkpoint-N, or load it with dcp.load",
            "incomplete",
        )
    return step


def _tell_of_ranks(source: ResumePoint, world: int) -> None:
    """Says what of a rank's own state does not come back on another number of ranks."""
    saved = source.topology.world_size
    if saved != world:
        log.warning(
            "%s was saved by %s, this training has %d: model and optimizer are loaded whole; "
            "random states and extra are those of the rank of the same number, where there is one",
            source.folder,
            counted(saved, "rank"),
            world,
        )
