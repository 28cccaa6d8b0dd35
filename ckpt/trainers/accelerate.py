"""Accelerate's ``save_state``, whole or absent,
and its ``load_state`` from the newest whole one.

    path = ckpt.trainers.accelerate.save_state(accelerator, "out", metrics={"eval_loss": 1.9})
    step = ckpt.trainers.accelerate.load_state(accelerator, "out")         0 if there is none yet
    accelerator.load_state(path)                    Accelerate's own, as ever

The files are those that Accelerate and DeepSpeed or FSDP write, in
``out/checkpoint-STEP``. Accelerate itself has no hook after saving, writes in place and,
with ``total_limit``, deletes before it saves. Source: Accelerate 1.15
``accelerator.py: save_state``, ``checkpointing.py``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ckpt import requirements

requirements.require_torch("ckpt.trainers.accelerate")
requirements.require("ckpt.trainers.accelerate", "accelerate")
requirements.require_if_installed("ckpt.trainers.accelerate", "deepspeed")

from accelerate.utils import MODEL_NAME, RNG_STATE_NAME, DistributedType

from ckpt.distributed.ranks import TIMEOUT, RankGroup, alive
from ckpt.engine.remedies import Ways
from ckpt.engine.settings import Loop
from ckpt.engine.view import EngineView, TrainingEngine, uses_node_local_storage
from ckpt.plain_torch import files as plain_files
from ckpt.plain_torch.engine import PlainEngine
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.load import loading
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import ResumePoint
from ckpt.resuming.select import VerifyLevel
from ckpt.resuming.topology import Reshard
from ckpt.runs.lease.lease import Lease
from ckpt.runs.retention import Retention
from ckpt.saving.commit import identity
from ckpt.saving.front_end import RunFolder, SaveDetails, describe
from ckpt.saving.model_weights import WeightsWriter
from ckpt.trainers import accelerate_plain
from converters.errors import CheckpointError
from converters.storage.store import local_path

# by accelerator
_leases: WeakKeyDictionary[Any, dict[Path, Lease]] = WeakKeyDictionary()
_folders_saved_into: set[Path] = set()  # folders that this process has saved into


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
    """Saves as RUN/checkpoint-STEP what ``accelerator.save_state`` saves,
    and returns that folder.

    Every rank calls it, between two steps.

    - ``step``: the engine's ``global_steps`` by default; without DeepSpeed nothing
      counts them, and it has to be given
    - ``metrics``: numbers by name, for ``retention`` (which keeps everything if
      ``None``)
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model folder too
    - ``extra``: this rank's objects with ``state_dict()``, by name; those that are
      registered with the accelerator are saved by it on rank 0
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    The rest goes to ``accelerator.save_state``. Its own naming and ``total_limit`` do
    not apply, and its counter does not move. ``CheckpointError`` on every rank if one
    fails; then nothing is committed, and what was before is untouched.
    """
    ranks = _ranks_of(accelerator, "save_state", timeout)
    engine, folder = _first_engine(accelerator), Path(run).absolute()
    plain_engine = engine if isinstance(engine, PlainEngine) else None
    run_folder = _run_folder(ranks, folder, accelerator)

    with ranks.step():
        if plain_engine is not None:
            step = accelerate_plain.require_saveable(plain_engine, step, weights)
        number = int(engine.global_steps if step is None else step)
        tag = MODEL_NAME if plain_engine is None else None
        details = SaveDetails(step=number, tag=tag, metrics=metrics, loop=_loop(accelerator))
        line = run_folder.line_of(engine)
        if folder not in _folders_saved_into:
            _folders_saved_into.add(folder)
            run_folder.warn_of_others(line)

        facts = describe(engine, details, line)
        writer = None
        if weights is not None:
            writer = WeightsWriter(engine, weights, max_shard_size, ranks)

    name = f"checkpoint-{number}"
    options = save_model_func_kwargs
    if plain_engine is None:
        options |= {"save_latest": False}  # the commit writes it
    with run_folder.saving(ranks, name, facts, _deepspeed_engines(accelerator)) as save:
        naming = _without_own_naming(accelerator.project_configuration, run_folder.is_local)
        with naming, alive(ranks) if plain_engine is not None else nullcontext():
            accelerator.save_state(str(save.folder), **options)
        if plain_engine is not None:
            save.add(plain_files.sync_own(save.folder, ranks.rank))
        save.write_rank_files(extra)
        save.write_companions(engine.module, writer)
        if writer is not None:
            save.write_weights(writer)

    run_folder.publish(retention, save.final, save.line)
    return save.final


def _ranks_of(accelerator: Any, call: str, timeout: float) -> RankGroup:
    """All ranks; ``CheckpointError`` where the accelerator counts others."""
    ranks = RankGroup(call, timeout)
    with ranks.step():
        ranks.require_counted(
            "the Accelerator",
            accelerator.process_index,
            accelerator.num_processes,
            "call accelerate.PartialState(cpu=True) before it is made",
        )
    return ranks


def _run_folder(ranks: RankGroup, folder: Path, accelerator: Any) -> RunFolder:
    """The folder of a save, in which no other job saves from the first one on.

    It is held as long as there is the accelerator: nothing says when an Accelerate
    training ends.
    """
    engine = _first_engine(accelerator)
    is_local = uses_node_local_storage(engine)
    if isinstance(engine, PlainEngine) and not engine.is_cut_up:
        is_local = bool(accelerator.project_configuration.save_on_each_node)
    run_folder = RunFolder.find(ranks, folder, is_local)
    leases = _leases.setdefault(accelerator, {})
    if folder not in leases:
        run_folder.hold(ranks)
        leases[folder] = run_folder.lease

    run_folder.lease = leases[folder]
    return run_folder


def load_state(
    accelerator: Any,
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    extra: Mapping[str, Any] | None = None,
    verify: VerifyLevel = "structure",
    on_mismatch: OnMismatch = "error",
    override: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    load_optimizer_states: bool = True,
    load_foreign: bool = False,
    committed_only: bool = False,
    reshard: Reshard = None,
    timeout: float = TIMEOUT,
    **load_model_func_kwargs: Any,
) -> int:
    """Loads, as ``accelerator.load_state`` does, the newest whole checkpoint of a run.

    Every rank calls it, after ``accelerator.prepare``. Returns the step; 0 if the run
    has none yet.

    - ``path``: the run, or a checkpoint, which has to be whole
    - ``tag``: the one of this folder name or step, or ``latest`` or ``best``, in the run
    - ``extra``: this rank's objects with ``load_state_dict()``, by the names they were
      saved by

    The others are those of ``ckpt.resume``; the rest goes to
    ``accelerator.load_state``, which itself takes what the engine could not load, or
    random states that are missing, for success. ``CheckpointError`` on every rank if
    one fails.
    """
    ranks = _ranks_of(accelerator, "load_state", timeout)
    options = LoadOptions(
        names_in(override),
        dict(renamed or {}),
        load_optimizer_states,
        ways=Ways(scheduler=None),
    )
    request = ResumeRequest(
        ranks=ranks,
        path=local_path(path),
        tag=tag,
        extra=extra,
        verify=verify,
        on_mismatch=on_mismatch,
        load_foreign=load_foreign,
        committed_only=committed_only,
        reshard=reshard,
        random_states_file=f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl",
        options=options,
    )
    override_names = sorted(options.override)
    request.require_same(load_optimizer_states=load_optimizer_states, override=override_names)
    engines = _deepspeed_engines(accelerator)
    if not engines:
        return accelerate_plain.load(
            accelerator, request, _loop(accelerator), load_model_func_kwargs
        )
    return _load(accelerator, engines, request, load_model_func_kwargs)


def _load(
    accelerator: Any,
    engines: list[TrainingEngine],
    request: ResumeRequest,
    keywords: Mapping[str, Any],
) -> int:
    ranks = request.ranks
    with ExitStack() as stack:
        source = request.choose(engines[0], stack)
        if source is None:
            return 0

        state, slot = request.prepare(engines[0], source)
        with ranks.step():
            _require_all_models(source, engines)
            if keywords.get("load_module_only"):
                raise CheckpointError(
                    "load_module_only: Accelerate loads the rest anyway; call "
                    "ckpt.resume(engine, ..., load_module_only=True)",
                    "unsupported",
                )

            comparison = request.compare(source, engines[0], _loop(accelerator))

        comparison.require(ranks, request.on_mismatch)
        with ranks.step(), alive(ranks), loading(engines, request.options, slot) as readers:
            accelerator.load_state(str(source.folder), **keywords)

    with request.finishing(source) as report:
        comparison.apply()
        report.rows = comparison.rows_after(readers[0])
        state.set(request.extra)

    request.commit(source)
    identity.line_after(engines[0], source.folder, source.step)
    return source.step


def _require_all_models(source: ResumePoint, engines: list[TrainingEngine]) -> None:
    """Raises where only the first of several models was resharded."""
    if source.resharded and len(engines) > 1:
        raise CheckpointError(
            f"{source.folder} was resharded from a checkpoint of {len(engines)} "
            "models, and has the first alone: several in one Accelerator cannot be "
            "resharded; go on with as many ranks and in the stage that they were "
            "saved in",
            "unsupported",
        )


def _loop(accelerator: Any) -> Loop:
    """The first scheduler and loader of data, which are those of the first model."""
    scheduler = next(iter(accelerator._schedulers), None)
    data = next(iter(accelerator._dataloaders), None)
    count = int(accelerator.gradient_accumulation_steps)
    micro_batches_done = 0
    if not accelerator.sync_gradients:
        micro_batches_done = int(accelerator.step) % count
    return Loop(scheduler, data, count, micro_batches_done)


def _deepspeed_engines(accelerator: Any) -> list[TrainingEngine]:
    """DeepSpeed's engines; none in a training without it."""
    models = list(accelerator._models)
    is_deepspeeds = accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise CheckpointError(
            f"this accelerator runs {accelerator.distributed_type.value}, of whose files ckpt "
            "knows nothing; call accelerator.save_state itself",
            "unsupported",
        )

    if not models:
        raise CheckpointError(
            "the accelerator has no model; call accelerator.prepare before saving",
            "unsupported",
        )

    return models if is_deepspeeds else []


def _first_engine(accelerator: Any) -> EngineView:
    """The engine of the first model, or what stands for one without DeepSpeed."""
    engines = _deepspeed_engines(accelerator)
    return engines[0] if engines else accelerate_plain.engine_of(accelerator)


@contextmanager
def _without_own_naming(configuration: Any, local: bool) -> Iterator[None]:
    """Has Accelerate save where it is told and delete nothing, in this block.

    Each node gets its own copy of what only the main process writes if nodes have
    folders of their own, for its ranks to load.
    """
    names = ("automatic_checkpoint_naming", "save_on_each_node", "iteration")
    old_values = {name: getattr(configuration, name) for name in names}
    configuration.automatic_checkpoint_naming = False
    configuration.save_on_each_node = local
    try:
        yield
    finally:
        for name, value in old_values.items():
            setattr(configuration, name, value)
