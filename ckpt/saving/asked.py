"""A resume that was asked for: the same on all ranks, and everything looked at before it begins."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks, alive
from ckpt.runs import adoption, locks
from ckpt.runs import manifest as manifests
from ckpt.runs.run import Checkpoint, is_numbered, open_checkpoint
from ckpt.saving import choosing, continuity, reading, topology, turns
from ckpt.saving.changes import Ways
from ckpt.saving.choosing import Thorough
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.layout import Layout
from ckpt.saving.source import Source, State
from ckpt.saving.topology import Reshard
from ckpt.saving.turns import Need, Turn
from converters import files
from converters.errors import CheckpointError
from converters.folder import is_tag_folder

log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller gave (``ckpt.saving.resume``)."""

    ranks: Ranks
    path: Path
    tag: str | None
    extra: Mapping[str, Any] | None
    verify: Thorough
    on_mismatch: OnMismatch
    load_foreign: bool = False
    reshard: Reshard = None
    memory: str | int | None = None
    ways: Ways = field(default_factory=Ways)

    def require_same(self, more: Sequence[Any] = ()) -> None:
        """``CheckpointError`` on every rank unless all ask for the same, and it is known."""
        with self.ranks.step() as step:
            continuity.require_known(self.on_mismatch)
            topology.require_known(self.reshard)
            step.value = [self.path.name, self.tag, sorted(self.extra or {}), *more]
        with self.ranks.step():
            for rank, what in enumerate(step.heard):
                if what != step.heard[0]:
                    raise CheckpointError(
                        f"rank {rank}: it asks to resume from {what}, rank 0 from {step.heard[0]} "
                        "(path, tag, extras, options); give all ranks the same",
                        "refused",
                    )

    def choose(self, engine: Any, stack: ExitStack) -> Source | None:
        """What to load, kept from being deleted while ``stack`` is open; ``None``: nothing yet."""
        ranks = self.ranks
        layout = Layout.of_engine(engine, ranks.world)
        options = (self.tag, self.verify, self.load_foreign, layout.topology.fits)
        found = choosing.choose(ranks, self.path, *options)
        if found is None:
            if not ranks.rank:
                print(f"ckpt: {self.path} has no checkpoint yet", file=sys.stderr, flush=True)
            return None
        itself = found.folder == Path(os.path.abspath(self.path))
        if not itself or is_numbered(found.folder):  # else it may be a save_dir of DeepSpeed
            found = committed(ranks, found)
        with ranks.step():
            stack.enter_context(locks.reading(found.folder))
            source = Source.of(found, self.tag)
        if not ranks.rank:
            print(f"ckpt: going on from {source.said(self.verify)}", file=sys.stderr, flush=True)
        loadable = topology.fitting(ranks, source, layout, self.reshard)
        if loadable is not source:
            with ranks.step():
                stack.enter_context(locks.reading(loadable.folder))
        return loadable

    def prepare(self, engine: Any, source: Source, everything: bool = True) -> tuple[State, Turn]:
        """This rank's own state, of ``everything`` that was saved, or of nothing; when it may load.

        ``CheckpointError`` on every rank if something is missing, or memory would not suffice.
        """
        with self.ranks.step() as needs:
            if engine.load_universal_checkpoint():
                raise CheckpointError(
                    "checkpoint.load_universal is set in DeepSpeed's configuration; unset it, what "
                    "is loaded here are ordinary checkpoints",
                    "unsupported",
                )
            paths = reading.files_of(engine, source.folder, source.tag)
            need = reading.need(engine, paths)
            there = turns.there(self.memory)
            needs.value = [os.environ.get("GROUP_RANK", "0"), need.reads, need.keeps, there]
            state = self.state(source) if everything else State.none()
        with self.ranks.step() as told:
            if not self.ranks.rank:
                told.value = self._turns(engine, source, needs.heard)
        after = told.heard[0].get(str(self.ranks.rank))
        return state, Turn(self.ranks, source.folder, need.reads, after)

    def state(self, source: Source) -> State:
        """What this rank saved beside the engine; ``CheckpointError`` if not all comes back."""
        state = State.read(source, self.ranks.rank)
        lost = state.lost(self.extra)
        excused = source.resharded or not source.saved_by_ckpt
        if lost and self.on_mismatch == "error" and not excused:
            raise CheckpointError(f"{source.folder}: {lost[0]}", "incomplete")
        for line in lost:
            log.warning("%s: %s", source.folder, line)
        return state

    def _turns(self, engine: Any, source: Source, heard: Sequence[Any]) -> dict[str, int]:
        """Whom each rank waits for before it loads, where not all of a node can at once."""
        after: dict[str, int] = {}
        for node in dict.fromkeys(node for node, *_ in heard):
            found = {rank: held for rank, held in enumerate(heard) if held[0] == node and held[1]}
            needs = [Need(reads, keeps) for _, reads, keeps, _ in found.values()]
            there = min((there for *_, there in found.values()), default=0)
            places = turns.at_once(source.folder, needs, there)
            if places == len(needs):
                continue
            turns.require_own_order(engine, source.folder)
            print(
                f"ckpt: {len(needs)} ranks of a node read up to {max(n.reads for n in needs):,} "
                f"bytes each into memory, {there:,} are available: {places} load at a time",
                file=sys.stderr,
                flush=True,
            )
            after |= {str(rank): first for rank, first in turns.order(list(found), places).items()}
        return after

    def tell(self, source: Source, rows: Sequence[continuity.Row], heard: Sequence[Any]) -> None:
        """The table on rank 0, and the end on all ranks if something is not as it was saved.

        ``heard`` on rank 0: the ``mismatches`` of each rank.
        """
        with self.ranks.step():
            if self.ranks.rank:
                return
            if rows:
                print(continuity.table(rows), file=sys.stderr, flush=True)
            wrong = [f"rank {rank}: {line}" for rank, lines in enumerate(heard) for line in lines]
            if self.on_mismatch == "warn":
                for line in wrong:
                    log.warning("%s: %s", source.folder, line)
            elif wrong:
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                raise CheckpointError(
                    f"{source.folder}: the training is not as it was saved: {wrong[0]}{more}; give "
                    f"it what it was saved with, or {self.ways.mismatch} to go on all the same",
                    "refused",
                )


def committed(ranks: Ranks, found: Checkpoint) -> Checkpoint:
    """The checkpoint with a manifest, given by rank 0 to one that was written without ckpt.

    So it is one of the run that goes on from it: retention counts it, and the next resume knows it.
    Where that cannot be, as on a disk that is only read, it stays as it is, and a warning says so.
    """
    if found.why != manifests.ABSENT or is_tag_folder(found.folder):
        return found
    with ranks.step() as step:
        if not ranks.rank:
            try:
                with alive(ranks):
                    adoption.commit(found.folder, data=False)
                step.value = True
                said = f"ckpt: {found.folder} has its manifest.json now, as one of this run"
                print(said, file=sys.stderr, flush=True)
            except (OSError, CheckpointError) as error:
                log.warning(
                    "%s stays without a manifest, retention leaves it: %s", found.folder, error
                )
    if not step.heard[0]:
        return found
    with ranks.step():
        if not files.appears(found.folder / manifests.NAME):
            raise CheckpointError(
                f"{found.folder / manifests.NAME}, which rank 0 wrote, is not seen by this rank; "
                "name a folder that all ranks share",
                "incomplete",
            )
    return open_checkpoint(found.folder)
