"""A resume that was asked for: the same on all ranks, and everything looked at before it begins."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import torch.distributed as dist

from ckpt import rewriting
from ckpt.ranks import Ranks
from ckpt.rewriting import Rewriting
from ckpt.runs import locks
from ckpt.runs.run import open_checkpoint
from ckpt.saving import choosing, continuity, reading, turns
from ckpt.saving.changes import Ways
from ckpt.saving.choosing import Thorough
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.source import Source, State, Topology
from ckpt.saving.turns import Need, Turn
from converters.errors import CheckpointError

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
    reshard: Literal["auto"] | None = None
    memory: str | int | None = None
    ways: Ways = field(default_factory=Ways)

    def require_same(self, more: Sequence[Any] = ()) -> None:
        """``CheckpointError`` on every rank unless all ask for the same, and it is known."""
        with self.ranks.step() as step:
            continuity.require_known(self.on_mismatch)
            if self.reshard not in (None, "auto"):
                raise CheckpointError(f"reshard={self.reshard!r}, expected None or auto", "refused")
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
        wanted = Topology(int(engine.zero_optimization_stage()), ranks.world)
        options = (self.tag, self.verify, self.load_foreign, wanted.fits)
        found = choosing.choose(ranks, self.path, *options)
        if found is None:
            if not ranks.rank:
                print(f"ckpt: {self.path} has no checkpoint yet", file=sys.stderr, flush=True)
            return None
        with ranks.step():
            stack.enter_context(locks.reading(found.folder))
            source = Source.of(found, self.tag)
        if not ranks.rank:
            print(f"ckpt: going on from {source.said(self.verify)}", file=sys.stderr, flush=True)
        if source.topology.loads_as(wanted):
            return source
        with ranks.step() as made:
            if not ranks.rank:
                settings = _stage3(engine) if wanted.stage == 3 else {}
                made.value = str(self._resharded(source, wanted, settings))
        with ranks.step():
            folder = Path(made.heard[0])
            stack.enter_context(locks.reading(folder))
            return Source.of(open_checkpoint(folder), source.tag)

    def _resharded(self, source: Source, wanted: Topology, settings: Mapping[str, Any]) -> Path:
        """Where the source is for this topology, made if need be and asked for; on rank 0.

        ``settings`` are those of the engine that the layout depends on.
        """
        there = source.topology
        what = (
            f"{source.folder} is of {there.world_size} ranks with ZeRO stage {there.stage}, this "
            f"training has {wanted.world_size} with stage {wanted.stage}"
        )
        if not there.stage or not wanted.stage:
            raise CheckpointError(
                f"{what}; only stages 1 to 3 can be resharded: set zero_optimization.stage to "
                f"{there.stage}",
                "unsupported",
            )
        if self.reshard is None:
            changed = settings if there.stage != wanted.stage else {}
            output = source.folder.with_name(
                f"{source.folder.name}-z{wanted.stage}-w{wanted.world_size}"
            )
            raise CheckpointError(
                f"{what}; run: ckpt reshard {source.folder} --world-size {wanted.world_size} "
                f"--stage {wanted.stage}{_options(changed)} -o {output}; or pass "
                'reshard="auto"',
                "unsupported",
            )
        from ckpt import reshard

        options: dict[str, Any] = {"stage": wanted.stage, "tag": source.tag}
        planned = reshard.prepare(source.folder, wanted.world_size, **settings, **options)
        if not _is_made_of(source, planned):
            print(f"ckpt: {what}: resharding to {planned.output}", file=sys.stderr, flush=True)
            with alive(self.ranks):
                reshard.run(planned)
        return planned.output

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
            files = reading.files_of(engine, source.folder, source.tag)
            need = reading.need(engine, files)
            there = turns.there(self.memory)
            needs.value = [os.environ.get("GROUP_RANK", "0"), need.reads, need.keeps, there]
            state = State.read(source, self.ranks.rank) if everything else State.none()
            lost = state.lost(self.extra)
            if lost and self.on_mismatch == "error" and not source.foreign:
                raise CheckpointError(f"{source.folder}: {lost[0]}", "incomplete")
            for line in lost:
                log.warning("%s: %s", source.folder, line)
        with self.ranks.step() as told:
            if not self.ranks.rank:
                told.value = self._turns(engine, source, needs.heard)
        after = told.heard[0].get(str(self.ranks.rank))
        return state, Turn(self.ranks, source.folder, need.reads, after)

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


@contextmanager
def alive(ranks: Ranks) -> Iterator[None]:
    """Shows the others that this rank is at work, in a block that may outlast their patience."""
    ends = Event()

    def beat() -> None:
        with suppress(dist.DistError):  # the main thread will hear of it
            while not ends.wait(1.0):
                ranks.beat()

    thread = Thread(target=beat, name="ckpt-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def _stage3(engine: Any) -> dict[str, Any]:
    """What the layout of a stage 3 engine depends on, by the options of ``reshard.prepare``.

    Muon sorts parameters by shape where it sees their shapes, not under ``zero.Init``.
    """
    optimizer, settings = engine.optimizer, {"sub_group_size": int(engine.zero_sub_group_size())}
    if not getattr(optimizer, "use_muon", False):
        return settings
    places = {id(parameter): at for at, parameter in enumerate(engine.module.parameters())}
    groups: dict[int, list[int]] = {}
    for index, parameters in enumerate(optimizer.fp16_groups):
        held = groups.setdefault(optimizer.sub_group_to_group_id[index], [])
        held += [places[id(parameter)] for parameter in parameters]
    return {**settings, "zero_init": all(held == sorted(held) for held in groups.values())}


def _options(settings: Mapping[str, Any]) -> str:
    """Those settings on the command line."""
    said = [f" --sub-group-size {settings['sub_group_size']}"] if settings else []
    if "zero_init" in settings:
        said.append(f" --{'' if settings['zero_init'] else 'no-'}zero-init")
    return "".join(said)


def _is_made_of(source: Source, planned: Rewriting) -> bool:
    """Whether the planned output is there, whole, and a resharding of this source for this."""
    if source.foreign or not planned.output.is_dir():
        return False
    made, held = open_checkpoint(planned.output), open_checkpoint(source.folder).manifest
    if made.why is not None or made.manifest is None or held is None or planned.target is None:
        return False
    return made.manifest.save == rewriting.save_of(held, planned.target)
