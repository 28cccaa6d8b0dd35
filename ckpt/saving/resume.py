"""A plain DeepSpeed training goes on from the newest whole checkpoint, provably as the same run.

    start = ckpt.resume(engine, "out", extra={"sampler": sampler})
    for step in range(start + 1, steps + 1): ...

Every rank calls it once, after ``deepspeed.initialize``. All ranks load the same checkpoint, or
none: what can be known is looked at on all of them before the engine is touched.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ckpt.ranks import TIMEOUT, Ranks, alive
from ckpt.saving import continuity, identity
from ckpt.saving.asked import Asked
from ckpt.saving.changes import Request, names_in
from ckpt.saving.choosing import Thorough
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.engines import Engines
from ckpt.saving.load import Load
from ckpt.saving.together import resume_together
from ckpt.saving.topology import Reshard


def resume(
    engine: Any,
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    extra: Mapping[str, Any] | None = None,
    client_state: MutableMapping[str, Any] | None = None,
    verify: Thorough = "structure",
    on_mismatch: OnMismatch = "error",
    override: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    load_module_strict: bool = True,
    load_foreign: bool = False,
    reshard: Reshard = None,
    memory: str | int | None = None,
    timeout: float = TIMEOUT,
) -> int:
    """Loads a checkpoint into ``engine`` and returns its step; 0 if the run has none yet.

    ``path`` is a run, whose newest whole checkpoint is taken, or a checkpoint, which has to be
    whole.

    - ``engine``: DeepSpeed's; or several by name, as they were given to ``Saver``
    - ``tag``: the one of this tag, folder name or step, or ``latest`` or ``best``, in the run
    - ``extra``: this rank's objects with ``load_state_dict()``, by the names they were saved by
    - ``client_state``: gets what was saved as such
    - ``verify``: "structure" looks at sizes and headers, "data" reads every byte first
    - ``on_mismatch``: "error" stops on every rank if the training is not as it was saved, or not
      all of it comes back; "warn" only says so. Other parameters are an error either way
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as this
      training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}; a saved name that
      ends with a dot is the front of all that begin with it
    - ``load_optimizer_states=False``: the weights, from their fp32 masters; the optimizer and its
      loss scale begin anew
    - ``load_module_only``: the weights and nothing else: no counters, random states or extras;
      returns 0
    - ``load_foreign``: whether to load one without a manifest, where it is asked for
    - ``reshard="auto"``: one of another world size or ZeRO stage is resharded beside it first
    - ``memory``: what the ranks of a node may take of its memory for files that cannot be mapped,
      in bytes or as "8GB"; by default what is available. They load by turns if need be
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    ``CheckpointError`` on every rank if one fails.
    """
    ranks = Ranks("resume", timeout)
    asked = Asked(ranks, Path(path), tag, extra, verify, on_mismatch, load_foreign, reshard, memory)
    request = Request(
        names_in(override),
        dict(renamed or {}),
        load_optimizer_states and not load_module_only,
        load_lr_scheduler_states and not load_module_only,
        load_module_only,
    )
    names = list(engine) if isinstance(engine, Mapping) else None
    options = (load_optimizer_states, load_lr_scheduler_states, load_module_only)
    asked.require_same([*options, sorted(request.override), names])
    if names is not None:
        with ranks.step():
            engines = Engines(engine)
        return resume_together(asked, engines, request, load_module_strict, client_state)
    with ExitStack() as stack:
        source = asked.choose(engine, stack)
        if source is None:
            return 0
        state, turn = asked.prepare(engine, source, not load_module_only)
        with ranks.step():
            comparison = Comparison(source, engine, request)
            load = Load(engine, source, turn, comparison, load_module_only)
        comparison.require(ranks, on_mismatch)
        with ranks.step(), alive(ranks):
            client = load(load_module_strict)
    with ranks.step() as step:
        rows = load.rows()
        step.value = continuity.mismatches(rows)
        if client_state is not None and not load_module_only:
            client_state.update(client)
        state.set(extra)
    asked.tell(source, rows, step.heard)
    if load_module_only:
        identity.begin(engine)
    else:
        identity.line_after(engine, source.folder, source.step)
    return 0 if load_module_only else source.step
