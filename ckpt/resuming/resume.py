"""A plain training goes on from the newest whole checkpoint, provably as the same run.

    start = ckpt.resume(engine, "out", extra={"sampler": sampler})
    for step in range(start + 1, steps + 1): ...

Every rank calls it once, after ``deepspeed.initialize``; or, without an engine, when
model and optimizer are made (``torch_resume``). All ranks load the same checkpoint, or
none: what can be known is looked at on all of them before the engine is touched.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypedDict, overload

from ckpt.distributed.ranks import TIMEOUT, RankGroup, alive
from ckpt.engine.view import TrainingEngine
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.load import Load
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.select import VerifyLevel
from ckpt.resuming.several_engines import resume_together
from ckpt.resuming.topology import Reshard
from ckpt.resuming.torch_resume import TorchResume
from ckpt.saving import saved_training
from ckpt.saving.commit import identity
from ckpt.saving.engines import Engines
from ckpt.torch_training.training import TorchTraining
from converters.storage.store import local_path

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from typing_extensions import Unpack


class ResumeOptions(TypedDict, total=False):
    """Keyword arguments of ``resume`` of any training, for type checkers."""

    tag: str | None
    extra: Mapping[str, Any] | None
    client_state: MutableMapping[str, Any] | None
    verify: VerifyLevel
    on_mismatch: OnMismatch
    override: Collection[str]
    renamed: Mapping[str, str] | None
    load_optimizer_states: bool
    load_lr_scheduler_states: bool
    load_module_only: bool
    load_module_strict: bool
    load_foreign: bool
    committed_only: bool
    reshard: Reshard
    memory: str | int | None
    timeout: float


@overload
def resume(
    engine: TrainingEngine | Mapping[str, TrainingEngine],
    path: str | os.PathLike[str],
    **options: Unpack[ResumeOptions],
) -> int: ...


@overload
def resume(
    *,
    model: nn.Module,
    run: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    **options: Unpack[ResumeOptions],
) -> int: ...


def resume(
    engine: TrainingEngine | Mapping[str, TrainingEngine] | None = None,
    path: str | os.PathLike[str] = "",
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    run: str | os.PathLike[str] = "",
    tag: str | None = None,
    extra: Mapping[str, Any] | None = None,
    client_state: MutableMapping[str, Any] | None = None,
    verify: VerifyLevel = "structure",
    on_mismatch: OnMismatch = "error",
    override: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    load_module_strict: bool = True,
    load_foreign: bool = False,
    committed_only: bool = False,
    reshard: Reshard = None,
    memory: str | int | None = None,
    timeout: float = TIMEOUT,
) -> int:
    """Loads a checkpoint into a training and returns its step;
    0 if the run has none yet.

    ``path`` is a run, whose newest whole checkpoint is taken, or a checkpoint, which
    has to be whole.

    - ``engine``: DeepSpeed's; or several by name, as they were given to ``Saver``
    - ``model``, ``optimizer``, ``scheduler`` and ``run`` in place of ``engine`` and ``path``: of
      a training without DeepSpeed (FSDP2, DDP, one process), on any number of ranks
    - ``tag``: the one of this tag, folder name or step, or ``latest`` or ``best``, in
      the run
    - ``extra``: this rank's objects with ``load_state_dict()``, by the names they were
      saved by
    - ``client_state``: gets what was saved as such
    - ``verify``: "structure" looks at sizes and headers, "data" reads every byte first
    - ``on_mismatch``: "error" stops on every rank if the training is not as it was
      saved, or not all of it comes back; "warn" only says so. Other parameters are an
      error either way
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as
      this training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}; a
      saved name that ends with a dot is the front of all that begin with it
    - ``load_optimizer_states=False``: the weights, from their fp32 masters; the
      optimizer is a new one, and the loss scale begins at its initial value
    - ``load_module_only``: the weights and nothing else: no counters, random states or
      extras; returns 0
    - ``load_foreign``: whether to load one without a manifest, where it is asked for,
      though it cannot prove to be whole
    - ``committed_only``: whether to pass over what has no manifest, also where it proves
      to be whole; by default the newest of both kinds is taken, and a line says so
    - ``reshard="auto"``: one of another world size or ZeRO stage, or of other
      tensor-parallel or expert ranks, is resharded beside it first; of one of FSDP that
      ``path`` names, DeepSpeed's files are made beside it, as ``ckpt from-dcp`` makes them
    - ``memory``: what the ranks of a node may take of its memory for files that cannot
      be mapped, in bytes or as "8GB"; by default what is available. The ranks take
      turns if need be
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    ``CheckpointError`` on every rank if one fails.
    """
    saved_training.require_either(engine, model, optimizer, scheduler)
    ranks = RankGroup("resume", timeout)
    options = LoadOptions(
        names_in(override),
        dict(renamed or {}),
        load_optimizer_states and not load_module_only,
        load_lr_scheduler_states and not load_module_only,
        load_module_only,
    )
    request = ResumeRequest(
        ranks=ranks,
        path=local_path(saved_training.require_run(run or path)),
        tag=tag,
        extra=extra,
        verify=verify,
        on_mismatch=on_mismatch,
        load_foreign=load_foreign,
        committed_only=committed_only,
        reshard=reshard,
        memory=memory,
        options=options,
    )
    request.require_same(
        load_optimizer_states=load_optimizer_states,
        load_lr_scheduler_states=load_lr_scheduler_states,
        load_module_only=load_module_only,
        override=sorted(options.override),
        engines=list(engine) if isinstance(engine, Mapping) else None,
    )

    if engine is None:
        training = TorchTraining(model, optimizer, scheduler)
        return TorchResume(request, training, load_module_strict)(client_state)

    if isinstance(engine, Mapping):
        with ranks.step():
            engines = Engines(engine)
        return resume_together(request, engines, load_module_strict, client_state)

    return _resume_one(request, engine, load_module_strict, client_state)


def _resume_one(
    request: ResumeRequest,
    engine: TrainingEngine,
    strict: bool,
    client_state: MutableMapping[str, Any] | None,
) -> int:
    ranks, module_only = request.ranks, request.options.weights_alone
    with ExitStack() as stack:
        source = request.choose(engine, stack)
        if source is None:
            return 0

        state, slot = request.prepare(engine, source, not module_only)
        with ranks.step():
            comparison = request.compare(source, engine)
            load = Load(engine, source, slot, comparison, module_only)

        comparison.require(ranks, request.on_mismatch)
        with ranks.step(), alive(ranks):
            loaded_state = load(strict)

    with request.finishing(source) as report:
        report.rows = load.rows()
        if client_state is not None and not module_only:
            client_state.update(loaded_state)
        state.set(request.extra)

    request.commit(source)
    if module_only:
        identity.begin(engine)
    else:
        identity.line_after(engine, source.folder, source.step)

    return 0 if module_only else source.step
