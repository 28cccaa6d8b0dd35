"""Several engines of one training go on together, from one checkpoint that has them all.

What can be known is looked at for every engine on all ranks before the first one is touched; then
they load one after the other, each from its own folder.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ckpt.ranks import Ranks, alive
from ckpt.runs import engines as recorded
from ckpt.runs import locks
from ckpt.runs.run import Checkpoint
from ckpt.saving import choosing, continuity, identity
from ckpt.saving.asked import Asked
from ckpt.saving.changes import Request
from ckpt.saving.comparison import Comparison
from ckpt.saving.engines import Engines
from ckpt.saving.layout import Topology
from ckpt.saving.load import Load
from ckpt.saving.source import Source, State
from converters.errors import CheckpointError


def resume_together(
    asked: Asked,
    engines: Engines,
    request: Request,
    strict: bool,
    client_state: MutableMapping[str, Any] | None = None,
) -> int:
    """As ``ckpt.resume`` of several engines by name; every rank calls it."""
    module_only = request.weights_alone
    with ExitStack() as stack:
        found = _chosen(asked, engines, stack)
        if found is None:
            return 0
        with asked.ranks.step():
            whole = _whole(found)
            sources = _sources(found, whole, engines, asked.ranks.world)
        _say(asked, whole)
        state = _state(asked, whole, not module_only)
        loads = []
        for name, engine in engines:
            alone = replace(asked, ranks=Ranks(asked.ranks.what, asked.ranks.timeout))
            _, turn = alone.prepare(engine, sources[name], False)
            with asked.ranks.step():
                comparison = Comparison(sources[name], engine, request)
                loads.append(Load(engine, sources[name], turn, comparison, module_only))
            comparison.require(asked.ranks, asked.on_mismatch)
        clients = []
        for load in loads:
            with load.turn.ranks.step(), alive(load.turn.ranks):
                clients.append(load(strict))
    with asked.ranks.step() as comparing:
        rows = [
            replace(row, name=f"{name}: {row.name}")
            for (name, _), load in zip(engines, loads, strict=True)
            for row in load.rows()
        ]
        comparing.value = continuity.mismatches(rows)
        if client_state is not None and not module_only:
            client_state.update(clients[0])
        state.set(asked.extra)
    asked.tell(whole, rows, comparing.heard)
    for _, engine in engines:
        if module_only:
            identity.begin(engine)
        else:
            identity.go_on(engine, found.manifest, whole.step)
    return 0 if module_only else whole.step


def _chosen(asked: Asked, engines: Engines, stack: ExitStack) -> Checkpoint | None:
    """The checkpoint, kept from being deleted while ``stack`` is open."""
    with asked.ranks.step():
        if asked.load_foreign or asked.reshard is not None:
            raise CheckpointError(
                "several engines: load_foreign and reshard take one engine; resume each from its "
                'own folder, as in resume(actor, "out/checkpoint-5/actor", load_foreign=True)',
                "unsupported",
            )
        wanted = Topology(int(engines.first.zero_optimization_stage()), asked.ranks.world)
    found = choosing.choose(asked.ranks, asked.path, asked.tag, asked.verify, False, wanted.fits)
    if found is None:
        if not asked.ranks.rank:
            print(f"ckpt: {asked.path} has no checkpoint yet", file=sys.stderr, flush=True)
        return None
    with asked.ranks.step():
        stack.enter_context(locks.reading(found.folder))
    return found


def _whole(found: Checkpoint) -> Source:
    """The checkpoint as one, without what its manifest says of each engine."""
    assert found.manifest is not None
    plain = replace(found.manifest, progress={})
    return Source.of(replace(found, manifest=plain))


def _sources(found: Checkpoint, whole: Source, engines: Engines, world: int) -> dict[str, Source]:
    """What each engine loads; ``CheckpointError`` unless they are those that were saved."""
    assert found.manifest is not None
    saved, given = recorded.names(found.manifest), engines.names
    if set(saved) != set(given):
        has = f"has the engines {', '.join(saved)}" if saved else "is of one engine without a name"
        raise CheckpointError(
            f"{found.folder} {has}, resume was given {', '.join(given)}; give it the same as when "
            "it was saved",
            "refused",
        )
    made = {}
    for name, tag in recorded.tags(found.manifest).items():
        noted = dict(found.manifest.progress[recorded.ENGINES][name])
        there = Topology(int(noted.pop("stage", 0)), found.manifest.world_size)
        wanted = Topology(int(engines.by_name[name].zero_optimization_stage()), world)
        folder = found.folder / name
        if not there.loads_as(wanted):
            raise CheckpointError(
                f"{folder} is of {there.world_size} ranks with ZeRO stage {there.stage}, this "
                f"training has {wanted.world_size} with stage {wanted.stage} for {name}; several "
                "engines are not resharded together: use as many ranks and the same stage",
                "unsupported",
            )
        last = tag.rpartition("/")[2]
        made[name] = replace(whole, folder=folder, tag=last, topology=there, progress=noted)
    return made


def _say(asked: Asked, whole: Source) -> None:
    if not asked.ranks.rank:
        print(f"ckpt: going on from {whole.said(asked.verify)}", file=sys.stderr, flush=True)


def _state(asked: Asked, whole: Source, everything: bool) -> State:
    """This rank's random states and extras, which are of all engines together."""
    with asked.ranks.step():
        return asked.state(whole) if everything else State.none()
