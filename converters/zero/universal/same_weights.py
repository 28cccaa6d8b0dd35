"""The evidence that the states of a universal folder are those of its model file."""

from __future__ import annotations

from converters.errors import CheckpointError
from converters.zero.checkpoint import Checkpoint
from converters.zero.naming import storage_views


def require(checkpoint: Checkpoint) -> None:
    """Raises unless the master weights begin with what the model file has, rounded.

    ds_to_universal.py scrambles them, states included, under round_robin_gradients.
    """
    from converters import cast

    for name, reference in checkpoint.weights.copies.items():
        tensor = checkpoint.weights.tensors[name]
        count = min(tensor.numel, storage_views.PROBE)
        if not cast.rounds_to(tensor.narrow(0, count), reference.narrow(0, count)):
            reason = ""
            if checkpoint.model.setting("zero_optimization", "round_robin_gradients"):
                reason = "ds_to_universal.py mixes them up under round_robin_gradients; "

            raise CheckpointError(
                f"{tensor.extents[0].path} has other values of {name} than "
                f"{checkpoint.model.path.name}: {reason}make the folder again with "
                "ckpt to-universal"
            )
