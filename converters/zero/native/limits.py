"""The limits of resharding:
what is not cut up for other ranks or another stage, and why."""

from __future__ import annotations

from collections.abc import Iterable

from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.zero.checkpoint import Checkpoint
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import ParamGroup


def require(checkpoint: Checkpoint) -> None:
    """Raises for what has no partitions to cut up, or not all of them."""
    path, model = checkpoint.place.folder, checkpoint.model
    absent = checkpoint.weights.absent
    absent_names = [name for name in absent if not name.endswith("_extra_state")]
    unnamed = [name for name in trained_names(checkpoint) if name not in model.module]

    if not checkpoint.ranks:
        reason = "was saved without ZeRO: it loads on any number of ranks as it is"
    elif model.setting("zero_optimization", "zenflow"):
        reason = "was saved with ZenFlow, whose own state is in no file; it cannot be resharded"
    elif is_whole_number(model.setting("zero_optimization", "mics_shard_size"), 1):
        reason = (
            "was saved with MiCS, whose shard groups a stock engine does not load from other "
            "partitions; it cannot be resharded"
        )
    elif (stated_size := model.root.get("dp_world_size")) != checkpoint.world_size:
        reason = (
            f"was saved by {checkpoint.world_size} ranks, but says dp_world_size "
            f"{stated_size}: its topology is not known"
        )
    elif absent_names:
        name = absent_names[0]
        reason = f"lacks {name} ({absent[name]}); it cannot be resharded"
    elif pieces := checkpoint.names.pieces:
        reason = (
            f"has {pieces[0]} as several tensors in its state dict (a hook cuts it "
            "up); such a checkpoint cannot be resharded"
        )
    elif unnamed:
        reason = f"lacks {unnamed[0]}, which is trained, in its state dict; it cannot be resharded"
    else:
        return

    raise CheckpointError(f"{path} {reason}", "unsupported")


def trained_names(checkpoint: Checkpoint) -> list[str]:
    """The names of the parameters that have an optimizer."""
    untrained = checkpoint.weights.buffers | checkpoint.weights.frozen
    return [name for name in checkpoint.weights.tensors if name not in untrained]


def require_rule(checkpoint: Checkpoint, topology: TargetTopology) -> None:
    """Raises where stage 3, whose placeholders have no places, could not tell names."""
    names = checkpoint.names
    if topology.stage == 3 and names.state and names.rule is None:
        name, state = next(iter(names.state.items()))
        raise CheckpointError(
            f"{checkpoint.place.folder}: the state dict calls the parameter {name} "
            f"{state}, and no one rule turns all such names into those; a checkpoint "
            "of stage 3 could not be read again, so reshard it to stage 1 or 2",
            "unsupported",
        )


def require_options(
    checkpoint: Checkpoint, groups: Iterable[ParamGroup], topology: TargetTopology
) -> None:
    """Raises for an elastic checkpoint that is to become one of stage 3."""
    if topology.stage == 3 and any(group.options is None for group in groups):
        raise CheckpointError(
            f"{checkpoint.place.folder} was saved with elastic_checkpoint, which keeps "
            "no param groups, and stage 3 needs them; reshard it to stage 1 or 2",
            "unsupported",
        )
