"""A Trainer that is made already,
by trl or another library, made to commit its checkpoints.

    trainer = ckpt.trainers.hf.commit(SFTTrainer(...), retention=ckpt.Retention(last=3))

Its class becomes one of the same name that has ``CommittedCheckpoints`` before all of
its own methods, so that what it overrides is called as it is in a class that a user
writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from transformers import Trainer

from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.topology import Reshard
from ckpt.runs.retention import Retention
from ckpt.saving.preemption import Preemption
from ckpt.trainers.hf.mixin import CommittedCheckpoints
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Unpack

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class CommitOptions(TypedDict, total=False):
    """The options of ``commit``:
    the attributes of ``CommittedCheckpoints`` and what it is of."""

    retention: Retention | None
    weights: str | None
    preemption: Preemption | None
    preflight: bool
    on_failure: Literal["raise", "warn"]
    on_mismatch: OnMismatch
    override: Collection[str]
    renamed: Mapping[str, str]
    load_optimizer_states: bool
    reshard: Reshard
    committed_only: bool
    timeout: float


def commit(trainer: AnyTrainer, **options: Unpack[CommitOptions]) -> AnyTrainer:
    """Has a Trainer that is made already save
    as ``CommittedCheckpoints`` does; returns it.

    For Trainers that other libraries make, such as trl's: its class becomes one of the
    same name with ``CommittedCheckpoints`` before its own methods. Call it before
    ``train``. ``CheckpointError`` for a Trainer that commits already, and for options
    that are not known or that mean something else to its class.
    """
    if isinstance(trainer, CommittedCheckpoints):
        raise CheckpointError(
            f"this {type(trainer).__name__} commits its checkpoints already; use either "
            "CommittedCheckpoints among its bases or ckpt.trainers.hf.commit, once",
            "unsupported",
        )

    kind = type(trainer)
    for name in options:
        if name not in CommitOptions.__annotations__:
            known_names = ", ".join(CommitOptions.__annotations__)
            raise CheckpointError(
                f"commit: {name} is not an option; expected {known_names}", "unsupported"
            )
    for name in CommitOptions.__annotations__:
        if hasattr(trainer, name):
            raise CheckpointError(
                f"{kind.__name__} has an attribute {name} of its own, which is an option of "
                "ckpt's; use ckpt.trainers.hf.CheckpointCallback",
                "unsupported",
            )

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    committing: Any = trainer
    committing.__class__ = type(kind.__name__, (CommittedCheckpoints, kind), names)
    for name, value in options.items():
        setattr(committing, name, value)

    committing._prepare_commits()
    committing._listen()
    return trainer
