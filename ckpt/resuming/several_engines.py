"""Several engines of one training go on together, from one checkpoint that has them all.

What can be known is looked at for every engine on all ranks before the first one is
touched; then they load one after the other, each from its own folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup, alive
from ckpt.engine.layout import Topology
from ckpt.folders import locks
from ckpt.resuming import select
from ckpt.resuming.load import Load
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import RankState, ResumePoint
from ckpt.runs import engines as recorded
from ckpt.runs.run import RunCheckpoint
from ckpt.saving.commit import identity
from ckpt.saving.engines import Engines
from converters.errors import CheckpointError
from converters.words import counted

log = logging.getLogger("ckpt")


def resume_together(
    resume_request: ResumeRequest,
    engines: Engines,
    strict: bool,
    client_state: MutableMapping[str, Any] | None = None,
) -> int:
    """Resumes several engines by name,
    as ``ckpt.resume`` does with one; every rank calls it."""
    module_only = resume_request.options.weights_alone
    with ExitStack() as stack:
        checkpoint = _choose(resume_request, engines, stack)
        if checkpoint is None:
            return 0

        with resume_request.ranks.step():
            joint_source = _joint_source(checkpoint)
            world = resume_request.ranks.world
            sources = _sources(checkpoint, joint_source, engines, world)

        _announce(resume_request, joint_source)
        state = _read_state(resume_request, joint_source, not module_only)
        loads = _prepare_loads(resume_request, engines, sources)

        client_states = []
        for load in loads:
            with load.slot.ranks.step(), alive(load.slot.ranks):
                client_states.append(load(strict))

    with resume_request.finishing(joint_source) as report:
        report.rows = [
            replace(row, name=f"{name}: {row.name}")
            for (name, _), load in zip(engines, loads, strict=True)
            for row in load.rows()
        ]
        if client_state is not None and not module_only:
            client_state.update(client_states[0])
        state.set(resume_request.extra)

    for _, engine in engines:
        if module_only:
            identity.begin(engine)
        else:
            identity.go_on(engine, checkpoint.manifest, joint_source.step)

    return 0 if module_only else joint_source.step


def _prepare_loads(
    resume_request: ResumeRequest, engines: Engines, sources: Mapping[str, ResumePoint]
) -> list[Load]:
    """A load for each engine, compared with what was saved; no engine is touched yet.

    ``CheckpointError`` on every rank for the first engine that does not go on as it was
    saved.
    """
    loads = []
    for name, engine in engines:
        ranks = RankGroup(resume_request.ranks.what, resume_request.ranks.timeout)
        engine_request = replace(resume_request, ranks=ranks)
        _, slot = engine_request.prepare(engine, sources[name], False)

        with resume_request.ranks.step():
            comparison = resume_request.compare(sources[name], engine)
            module_only = resume_request.options.weights_alone
            loads.append(Load(engine, sources[name], slot, comparison, module_only))
        comparison.require(resume_request.ranks, resume_request.on_mismatch)

    return loads


def _choose(
    resume_request: ResumeRequest,
    engines: Engines,
    stack: ExitStack,
) -> RunCheckpoint | None:
    """The checkpoint, kept from being deleted while ``stack`` is open."""
    with resume_request.ranks.step():
        if resume_request.load_foreign or resume_request.reshard is not None:
            raise CheckpointError(
                "several engines: load_foreign and reshard take one engine; resume "
                "each from its own folder, as in resume(actor, "
                '"out/checkpoint-5/actor", load_foreign=True)',
                "unsupported",
            )

        current_topology = Topology(
            int(engines.first.zero_optimization_stage()), resume_request.ranks.world
        )

    checkpoint = select.select_checkpoint(
        resume_request.ranks,
        resume_request.path,
        resume_request.tag,
        resume_request.verify,
        False,
        current_topology.fits,
        committed_only=resume_request.committed_only,
    )
    if checkpoint is None:
        if not resume_request.ranks.rank:
            log.info("%s has no checkpoint to go on from yet", resume_request.path)
        return None

    with resume_request.ranks.step():
        stack.enter_context(locks.reading(checkpoint.folder))
    return checkpoint


def _joint_source(checkpoint: RunCheckpoint) -> ResumePoint:
    """The checkpoint as one, without what its manifest says of each engine."""
    assert checkpoint.manifest is not None
    manifest = replace(checkpoint.manifest, progress={})
    return ResumePoint.of(replace(checkpoint, manifest=manifest))


def _sources(
    checkpoint: RunCheckpoint, joint_source: ResumePoint, engines: Engines, world: int
) -> dict[str, ResumePoint]:
    """The source of each engine;
    ``CheckpointError`` unless they are those that were saved."""
    assert checkpoint.manifest is not None
    _require_engines(checkpoint.folder, recorded.names(checkpoint.manifest), engines.names)

    sources = {}
    for name, tag in recorded.tags(checkpoint.manifest).items():
        progress = dict(checkpoint.manifest.progress[recorded.ENGINES][name])
        saved_stage = int(progress.pop("stage", 0))
        saved_topology = Topology(saved_stage, checkpoint.manifest.world_size)
        current_stage = int(engines.by_name[name].zero_optimization_stage())
        current_topology = Topology(current_stage, world)

        folder = checkpoint.folder / name
        if not saved_topology.loads_as(current_topology):
            raise CheckpointError(
                f"{folder} is of {counted(saved_topology.world_size, 'rank')} with ZeRO stage "
                f"{saved_topology.stage}, this training has "
                f"{current_topology.world_size} with stage {current_topology.stage} "
                f"for {name}; several engines are not resharded together: use as many "
                "ranks and the same stage",
                "unsupported",
            )

        inner_tag = tag.rpartition("/")[2]
        sources[name] = replace(
            joint_source,
            folder=folder,
            tag=inner_tag,
            topology=saved_topology,
            progress=progress,
        )

    return sources


def _require_engines(folder: Path, saved_names: Sequence[str], engine_names: Sequence[str]) -> None:
    """``CheckpointError`` unless the engines have the names
    that ``folder`` was saved with."""
    if set(saved_names) == set(engine_names):
        return

    finding = "is of one engine without a name"
    if saved_names:
        finding = f"has the engines {', '.join(saved_names)}"
    raise CheckpointError(
        f"{folder} {finding}, resume was given "
        f"{', '.join(engine_names)}; give it the same as when it was saved",
        "refused",
    )


def _announce(resume_request: ResumeRequest, joint_source: ResumePoint) -> None:
    if not resume_request.ranks.rank:
        log.info("going on from %s", joint_source.said(resume_request.verify))


def _read_state(
    resume_request: ResumeRequest, joint_source: ResumePoint, with_state: bool
) -> RankState:
    """This rank's random states and extras, which are of all engines together."""
    with resume_request.ranks.step():
        return resume_request.state(joint_source) if with_state else RankState.none()
