"""Accelerate's ``save_state``, whole or absent, and its ``load_state`` from the newest whole one.

    path = ckpt.trainers.accelerate.save_state(accelerator, "out", metrics={"eval_loss": 1.9})
    step = ckpt.trainers.accelerate.load_state(accelerator, "out")         0 if there is none yet
    accelerator.load_state(path)                    Accelerate's own, as ever

The files are those that Accelerate and DeepSpeed write, in ``out/checkpoint-STEP``. Accelerate
itself has no hook after saving, writes in place and, with ``total_limit``, deletes before it saves.
Source: Accelerate 1.15 ``accelerator.py: save_state``, ``checkpointing.py``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.utils import MODEL_NAME, DistributedType

from ckpt.ranks import TIMEOUT, Ranks, alive
from ckpt.runs.lease import Lease
from ckpt.runs.retention import Retention
from ckpt.saving import continuity, extras, identity, nodes, reading
from ckpt.saving.asked import Asked
from ckpt.saving.changes import Request, Ways, names_in
from ckpt.saving.choosing import Thorough
from ckpt.saving.commit import Commit, Facts
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.nodes import Nodes
from ckpt.saving.progress import metrics as plain_metrics
from ckpt.saving.progress import progress, record, versions
from ckpt.saving.publish import publish
from ckpt.saving.settings import Loop
from ckpt.saving.source import Source
from ckpt.saving.taking import beside
from ckpt.saving.topology import Reshard
from ckpt.saving.weights import Weights
from ckpt.trainers import streamed
from ckpt.trainers.aside import aside
from converters.errors import CheckpointError

_leases: WeakKeyDictionary[Any, dict[Path, Lease]] = WeakKeyDictionary()  # by accelerator
_seen: set[Path] = set()  # folders that this process has saved into


def save_state(
    accelerator: Any,
    run: str | os.PathLike[str],
    *,
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    retention: Retention | None = None,
    weights: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    timeout: float = TIMEOUT,
    **save_model_func_kwargs: Any,
) -> Path:
    """Saves as RUN/checkpoint-STEP what ``accelerator.save_state`` saves, and returns that folder.

    Every rank calls it, between two steps.

    - ``step``: the engine's ``global_steps`` by default
    - ``metrics``: numbers by name, for ``retention`` (which keeps everything if ``None``)
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model folder too
    - ``extra``: this rank's objects with ``state_dict()``, by name; those that are registered with
      the accelerator are saved by it on rank 0
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    The rest goes to ``accelerator.save_state``. Its own naming and ``total_limit`` do not apply,
    and its counter does not move. ``CheckpointError`` on every rank if one fails; then nothing is
    committed, and what was before is untouched.
    """
    engines = _engines(accelerator)
    engine, folder = engines[0], Path(run).absolute()
    ranks = Ranks("save_state", timeout)
    found = nodes.find(ranks, folder, nodes.local_storage(engine))
    _hold(ranks, found, folder, accelerator)
    with ranks.step():
        number = int(engine.global_steps if step is None else step)
        stage = int(engine.zero_optimization_stage())
        said = plain_metrics(metrics)
        line = identity.line_of(engine, folder)
        if found.commits and folder not in _seen:
            _seen.add(folder)
            identity.warn_of_others(folder, line)
        noted = record(engine, None, _loop(accelerator))
        facts = Facts(number, MODEL_NAME, line, "full", stage, versions(), said, noted)
        made = Weights(engine, weights, max_shard_size, ranks) if weights is not None else None
    commit = Commit(ranks, found, folder / f"checkpoint-{number}", facts)
    with aside(commit, engines) as staging:
        options = save_model_func_kwargs | {"save_latest": False}  # the commit writes it
        with _named_by_us(accelerator.project_configuration, found.local):
            accelerator.save_state(str(staging), **options)
        commit.files |= extras.write(staging, ranks.rank, extra)
        with ranks.step():
            if not ranks.rank:
                beside(engine.module, staging, made)
        if made is not None:
            streamed.write(made, commit)
    if found.commits:
        publish(folder, retention, commit.final, commit.line)
    return commit.final


def _hold(ranks: Ranks, place: Nodes, folder: Path, accelerator: Any) -> None:
    """From the first save into a folder on, no other job saves there, as long as there is the
    accelerator: nothing says when an Accelerate training ends.
    """
    held = _leases.setdefault(accelerator, {})
    if folder not in held:
        held[folder] = nodes.hold(ranks, place, folder)


def load_state(
    accelerator: Any,
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    extra: Mapping[str, Any] | None = None,
    verify: Thorough = "structure",
    on_mismatch: OnMismatch = "error",
    override: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    load_optimizer_states: bool = True,
    load_foreign: bool = False,
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
    **load_model_func_kwargs: Any,
) -> int:
    """What ``accelerator.load_state`` loads, from the newest whole checkpoint of a run.

    Every rank calls it, after ``accelerator.prepare``. Returns the step; 0 if the run has none yet.

    - ``path``: the run, or a checkpoint, which has to be whole
    - ``tag``: the one of this folder name or step, or ``latest`` or ``best``, in the run
    - ``extra``: this rank's objects with ``load_state_dict()``, by the names they were saved by

    The others are those of ``ckpt.resume``; the rest goes to ``accelerator.load_state``, which
    itself takes what the engine could not load, or random states that are missing, for success.
    ``CheckpointError`` on every rank if one fails.
    """
    engines = _engines(accelerator)
    ranks = Ranks("load_state", timeout)
    asked = Asked(ranks, Path(path), tag, extra, verify, on_mismatch, load_foreign, reshard)
    request = Request(
        names_in(override),
        dict(renamed or {}),
        load_optimizer_states,
        ways=Ways(scheduler=None),
    )
    asked.require_same([load_optimizer_states, sorted(request.override)])
    with ExitStack() as stack:
        source = asked.choose(engines[0], stack)
        if source is None:
            return 0
        state, turn = asked.prepare(engines[0], source)
        with ranks.step():
            _require_all_models(source, engines)
            if load_model_func_kwargs.get("load_module_only"):
                raise CheckpointError(
                    "load_module_only: Accelerate loads the rest all the same; call "
                    "ckpt.resume(engine, ..., load_module_only=True)",
                    "unsupported",
                )
            comparison = Comparison(source, engines[0], request, loop=_loop(accelerator))
        comparison.require(ranks, on_mismatch)
        with ranks.step(), alive(ranks), ExitStack() as maps:
            first, *others = engines  # whose files the turn was worked out for
            names = request.renamed
            readers = [maps.enter_context(reading.mapped(first, turn=turn, renamed=names))]
            readers += [maps.enter_context(reading.mapped(e, renamed=names)) for e in others]
            for engine in engines if not load_optimizer_states else ():
                maps.enter_context(reading.weights_alone(engine))
            accelerator.load_state(str(source.folder), **load_model_func_kwargs)
    with ranks.step() as step:
        comparison.apply()
        without = () if readers[0].change is None else ("loss_scale",)
        rows = comparison.rows(progress(engines[0]), without, readers[0].config)
        step.value = continuity.mismatches(rows)
        state.set(extra)
    asked.tell(source, rows, step.heard)
    identity.line_after(engines[0], source.folder, source.step)
    return source.step


def _require_all_models(source: Source, engines: list[Any]) -> None:
    """Raises where only the first of several models was resharded."""
    if source.resharded and len(engines) > 1:
        raise CheckpointError(
            f"{source.folder} was resharded from a checkpoint of {len(engines)} models, and has "
            "the first alone: several in one Accelerator cannot be resharded; go on with as many "
            "ranks and in the stage that they were saved in",
            "unsupported",
        )


def _loop(accelerator: Any) -> Loop:
    """The first scheduler and loader of data, which are those of the first model."""
    scheduler = next(iter(accelerator._schedulers), None)
    data = next(iter(accelerator._dataloaders), None)
    count = int(accelerator.gradient_accumulation_steps)
    done = 0 if accelerator.sync_gradients else int(accelerator.step) % count
    return Loop(scheduler, data, count, done)


def _engines(accelerator: Any) -> list[Any]:
    models = list(accelerator._models)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise CheckpointError(
            f"this accelerator runs {accelerator.distributed_type.value}; "
            "ckpt saves trainings with DeepSpeed, call accelerator.save_state itself",
            "unsupported",
        )
    if not models:
        raise CheckpointError(
            "the accelerator has no model; call accelerator.prepare before saving", "unsupported"
        )
    return models


@contextmanager
def _named_by_us(configuration: Any, local: bool) -> Iterator[None]:
    """Accelerate saves where it is told and deletes nothing; after it, all is as it was.

    Each node gets its own copy of what only the main process writes if nodes have folders of their
    own, for its ranks to load.
    """
    names = ("automatic_checkpoint_naming", "save_on_each_node", "iteration")
    before = {name: getattr(configuration, name) for name in names}
    configuration.automatic_checkpoint_naming, configuration.save_on_each_node = False, local
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(configuration, name, value)
