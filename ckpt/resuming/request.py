"""A resume that was asked for: the same on all ranks,
and everything looked at before it begins."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt import text
from ckpt.distributed import load_slots
from ckpt.distributed.load_slots import LoadSlot, Need
from ckpt.distributed.ranks import RankGroup, alive
from ckpt.engine import mapped_loading, precision, view
from ckpt.engine.layout import Layout
from ckpt.engine.settings import ENGINE_ALONE, Loop
from ckpt.engine.view import EngineView
from ckpt.folders import filenames, locks
from ckpt.resuming import continuity, select, topology
from ckpt.resuming.changes import LoadOptions
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.resume_point import NO_RANDOM_STATES, RankState, ResumePoint
from ckpt.resuming.select import VerifyLevel
from ckpt.resuming.topology import Reshard
from ckpt.rewrite import dcp_for_engine
from ckpt.runs import manifest as manifests
from ckpt.runs.run import RunCheckpoint, is_numbered, open_checkpoint
from ckpt.runs.upkeep import adoption
from converters.errors import CheckpointError
from converters.storage import local
from converters.words import first
from converters.zero.files.discovery import is_tag_folder

log = logging.getLogger("ckpt")


@dataclass(slots=True)
class ResumeReport:
    """The report of a resume:
    counters and settings as they were saved and as they are."""

    rows: Sequence[continuity.Row] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """The arguments of a front end's caller;
    ``ckpt.resuming.resume`` describes each."""

    ranks: RankGroup
    path: Path
    tag: str | None = None
    extra: Mapping[str, Any] | None = None
    verify: VerifyLevel = "structure"
    on_mismatch: OnMismatch = "error"
    load_foreign: bool = False
    committed_only: bool = False
    reshard: Reshard = None
    memory: str | int | None = None
    random_states_file: str | None = None  # which the front end itself restores, on this rank
    options: LoadOptions = field(default_factory=LoadOptions)
    began_at: float = field(default_factory=time.monotonic)

    def require_same(self, **options: Any) -> None:
        """``CheckpointError`` on every rank unless all ask for the same,
        and it is known.

        ``options`` are arguments beside those here, as JSON.
        """
        with self.ranks.step() as requests:
            continuity.require_known(self.on_mismatch)
            topology.require_known(self.reshard)
            extra_names = sorted(self.extra or {})
            arguments = {"path": self.path.name, "tag": self.tag, "extra": extra_names}
            requests.value = arguments | options

        with self.ranks.step():
            for rank, request in enumerate(requests.heard):
                expected = requests.heard[0]
                names = [name for name in request if request[name] != expected[name]]
                if names:
                    raise CheckpointError(
                        f"rank {rank} resumes with {_words(request, names)}, rank 0 with "
                        f"{_words(expected, names)}; pass the same arguments on every rank",
                        "refused",
                    )

    def compare(
        self, source: ResumePoint, engine: EngineView, loop: Loop = ENGINE_ALONE
    ) -> Comparison:
        """Compares what was saved with the training of ``engine``,
        which has not loaded it."""
        return Comparison(source, engine, self.options, loop=loop)

    @contextmanager
    def finishing(self, source: ResumePoint) -> Iterator[ResumeReport]:
        """A block for what follows the load, which puts the ``rows`` into the report.

        Every rank calls it; after the block they are told (``tell``).
        """
        with self.ranks.step() as results:
            report = ResumeReport()
            yield report
            results.value = continuity.mismatches(report.rows)

        self.tell(source, report.rows, results.heard)
        if not self.ranks.rank:
            log.info(
                "%s %s (%s) at step %d in %s",
                "loaded the weights of" if self.options.weights_alone else "resumed from",
                source.folder,
                text.size(source.nbytes),
                source.step,
                text.seconds(time.monotonic() - self.began_at),
            )

    def choose(self, engine: EngineView, stack: ExitStack) -> ResumePoint | None:
        """Chooses the checkpoint to load, which is not deleted while ``stack`` is open;
        ``None``: there is none yet."""
        ranks = self.ranks
        layout = Layout.of_engine(engine, ranks.world)
        options = (self.tag, self.verify, self.load_foreign, layout.topology.fits)
        path = self.path
        if self.reshard is not None and layout.target is not None and not self.committed_only:
            buffers = [name for name, _ in engine.module.named_buffers()]
            engine_precision = precision.of_engine(engine)
            path = dcp_for_engine.loadable_path(
                ranks, path, layout.target, engine_precision, buffers
            )

        checkpoint = select.select_checkpoint(
            ranks, path, *options, committed_only=self.committed_only
        )
        if checkpoint is None:
            if not ranks.rank:
                log.info("%s has no checkpoint to go on from yet", self.path)
            return None

        with ranks.step():
            stack.enter_context(locks.reading(checkpoint.folder))
        source = ResumePoint.on_all_ranks(ranks, checkpoint, self.tag)
        with ranks.step():
            source.require_loadable(layout.topology)

        if self.reshard is not None and not source.topology.loads_as(layout.topology):
            source = self.commit(source)  # what is made of it names it, so that it is made once

        if not ranks.rank and not source.foreign:  # of such one the choice has said it
            log.info("going on from %s", source.said(self.verify))
        loadable = topology.fitting(ranks, source, layout, self.reshard)
        if loadable is not source:
            with ranks.step():
                stack.enter_context(locks.reading(loadable.folder))

        return loadable

    def commit(self, source: ResumePoint) -> ResumePoint:
        """Commits the checkpoint that a training goes on from, if it was written
        without ckpt, and returns it.

        Every rank calls it once all is as it was saved: a resume that is refused leaves
        nothing behind.
        """
        if source.choice is None:
            return source

        # One that is the path itself and has no number may be a save_dir of DeepSpeed.
        is_path_itself = source.choice == Path(os.path.abspath(self.path))
        if is_path_itself and not is_numbered(source.choice):
            return source

        checkpoint = committed(self.ranks, open_checkpoint(source.choice))
        return source if checkpoint.manifest is None else ResumePoint.of(checkpoint, self.tag)

    def prepare(
        self,
        engine: EngineView,
        source: ResumePoint,
        with_state: bool = True,
    ) -> tuple[RankState, LoadSlot]:
        """This rank's own state, of ``with_state`` that was saved, or of nothing; when
        it may load.

        ``CheckpointError`` on every rank if something is missing, or memory would not
        suffice.
        """
        with self.ranks.step() as needs:
            if view.loads_universal(engine):
                raise CheckpointError(
                    "checkpoint.load_universal is set in DeepSpeed's configuration; "
                    "unset it, what is loaded here are ordinary checkpoints",
                    "unsupported",
                )

            paths = mapped_loading.files_of(engine, source.folder, source.tag)
            need = mapped_loading.need(engine, paths)
            available_bytes = load_slots.node_memory(self.memory)
            needs.value = [
                os.environ.get("GROUP_RANK", "0"),
                need.reads,
                need.keeps,
                available_bytes,
            ]
            state = self.state(source) if with_state else RankState.none()

        with self.ranks.step() as slot_order:
            if not self.ranks.rank:
                slot_order.value = self._slots(engine, source, needs.heard)

        predecessor = slot_order.heard[0].get(str(self.ranks.rank))
        return state, LoadSlot(self.ranks, source.folder, need.reads, predecessor)

    def state(self, source: ResumePoint) -> RankState:
        """Reads what this rank saved beside the engine;
        ``CheckpointError`` if not all comes back."""
        state = RankState.read(source, self.ranks.rank)
        losses = state.lost(self.extra)
        if state.random is None and not source.saved_by_ckpt:
            losses = self._without_random_states(source, losses)
        is_excused = source.resharded or not source.saved_by_ckpt
        if losses and self.on_mismatch == "error" and not is_excused:
            raise CheckpointError(f"{source.folder}: {losses[0]}", "incomplete")
        for line in losses:
            log.warning("%s: %s", source.folder, line)
        return state

    def _without_random_states(self, source: ResumePoint, losses: list[str]) -> list[str]:
        """The losses of a checkpoint that another program wrote:
        no rank has its random states.

        Rank 0 says it once, unless the front end has a file of its own that it restores.
        """
        own_file = self.random_states_file
        has_own = own_file is not None and (source.folder / own_file).exists()
        if not self.ranks.rank and not has_own:
            log.warning(
                "%s has no random states that ckpt reads: dropout and shuffling go on from the "
                "seed of this script",
                source.folder,
            )
        return [line for line in losses if line != NO_RANDOM_STATES]

    def _slots(
        self,
        engine: EngineView,
        source: ResumePoint,
        reports: Sequence[Any],
    ) -> dict[str, int]:
        """Which rank each one waits for before it loads,
        where not all of a node can at once."""
        predecessors: dict[str, int] = {}
        for node in dict.fromkeys(node for node, *_ in reports):
            loading_ranks = {
                rank: report
                for rank, report in enumerate(reports)
                if report[0] == node and report[1]
            }
            needs = [Need(reads, keeps) for _, reads, keeps, _ in loading_ranks.values()]
            available = min((room for *_, room in loading_ranks.values()), default=0)
            slots = load_slots.slot_count(source.folder, needs, available)
            if slots == len(needs):
                continue

            mapped_loading.require_own_order(engine, source.folder)
            log.info(
                "%d ranks of a node read up to %s bytes each into memory, "
                "%s are available: %d load at a time",
                len(needs),
                f"{max(need.reads for need in needs):,}",
                f"{available:,}",
                slots,
            )
            order = load_slots.predecessors(list(loading_ranks), slots)
            predecessors |= {str(rank): first for rank, first in order.items()}

        return predecessors

    def tell(
        self, source: ResumePoint, rows: Sequence[continuity.Row], mismatches: Sequence[Any]
    ) -> None:
        """Logs the table on rank 0,
        and raises on all ranks if something is not as it was saved.

        ``mismatches`` on rank 0: those of each rank.
        """
        with self.ranks.step():
            if self.ranks.rank:
                return

            if rows:
                title = "as it was saved, and as it is now"
                log.info("%s: %s\n%s", source.folder, title, continuity.table(rows))
            mismatch_lines = [
                f"rank {rank}: {line}"
                for rank, rank_lines in enumerate(mismatches)
                for line in rank_lines
            ]
            if self.on_mismatch == "warn":
                for line in mismatch_lines:
                    log.warning("%s: %s", source.folder, line)
            elif mismatch_lines:
                raise CheckpointError(
                    f"{source.folder}: the training is not as it was saved: "
                    f"{first(mismatch_lines)}; give it what it was saved with, "
                    f"or {self.options.ways.mismatch} to go on anyway",
                    "refused",
                )


def committed(ranks: RankGroup, checkpoint: RunCheckpoint) -> RunCheckpoint:
    """The checkpoint with a manifest,
    given by rank 0 to one that was written without ckpt.

    So it is one of the run that goes on from it: retention counts it, and the next
    resume knows it. Where that cannot be, as on a disk that is only read, it stays as
    it is, and a warning says so.
    """
    if checkpoint.why != manifests.ABSENT or is_tag_folder(checkpoint.folder):
        return checkpoint

    with ranks.step() as outcome:
        if not ranks.rank:
            try:
                with alive(ranks):
                    adoption.commit(checkpoint.folder, data=False)
                outcome.value = True
                message = "%s has its manifest.json now, as one of this run"
                log.info(message, checkpoint.folder)
            except (OSError, CheckpointError) as error:
                log.warning(
                    "%s stays without a manifest, retention leaves it: %s",
                    checkpoint.folder,
                    error,
                )

    if not outcome.heard[0]:
        return checkpoint

    with ranks.step():
        if not local.wait_for_file(checkpoint.folder / filenames.MANIFEST):
            raise CheckpointError(
                f"{checkpoint.folder / filenames.MANIFEST}, which rank 0 wrote, is "
                "not seen by this rank; name a folder that all ranks share",
                "incomplete",
            )

    return open_checkpoint(checkpoint.folder)


def _words(request: Mapping[str, Any], names: Sequence[str]) -> str:
    """The named arguments of a resume: ``path 'out', tag None, override lr, betas``."""
    texts = []
    for name in names:
        value = request[name]
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else repr(value)
        texts.append(f"{name} {text}")
    return ", ".join(texts)
