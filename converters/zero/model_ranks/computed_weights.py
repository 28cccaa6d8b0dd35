"""The weights that the model computes with, of a checkpoint of more than ZeRO.

Stages 0 to 2 save them in model files, files of layers and files of single experts,
which the readers of each kind put together as they do with the fp32 ones. Stage 3 saves
none.
"""

from __future__ import annotations

from dataclasses import replace

from converters.errors import CheckpointError
from converters.options import WEIGHTS
from converters.source import MASTERS, Source


def of(source: Source) -> Source:
    """The same with the weights of the model files,
    and the fp32 ones as what they are compared with.

    ``CheckpointError`` where the files do not have them.
    """
    weights = source.weights
    stored = {**weights.copies, **weights.newer}
    trained = weights.tensors.keys() - weights.buffers - weights.frozen
    missing_names = sorted(trained - stored.keys()) if source.stage else []
    if missing_names:
        reason = f"no 16-bit weights of {missing_names[0]}"
        if source.stage == 3:
            reason = "no 16-bit weights, as it is of ZeRO-3"
        raise CheckpointError(
            f"{source.place.folder} has {reason}; convert the fp32 weights: {WEIGHTS('fp32')}",
            "incomplete",
        )

    tensors = {name: stored.get(name, tensor) for name, tensor in weights.tensors.items()}
    masters = {
        name: weights.tensors[name]
        for name, copy in weights.copies.items()
        if copy.dtype.floating and weights.tensors[name].dtype.floating
    }
    types = sorted({tensors[name].dtype.value for name in trained})
    note = f"the weights are those of the model files ({', '.join(types)}), not the optimizer's"
    return replace(
        source,
        weights=replace(weights, tensors=tensors, copies=masters),
        record=MASTERS,
        of_one_save=False,
        notes=(note, *source.notes),
    )
