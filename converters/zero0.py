"""No ZeRO: one file, ``mp_rank_00_model_states.pt``, with the optimizer's state inside.

    fp32 training     the module itself is in fp32
    fused optimizer   ``fp32_groups_flat``: a vector per group, named by the views of the module
    other optimizer   ``fp32_groups``: lists of tensors without names

The unnamed ones are matched in the order in which the module has them, group by group: a group's
tensors come in the order of ``named_parameters``. Shapes and values (each rounds to one 16-bit
tensor) must agree with that, or the checkpoint is refused. Source: DeepSpeed 0.19.8
``runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py``.
"""

from __future__ import annotations

from converters import states, views
from converters.errors import CheckpointError
from converters.parameters import Parameters
from converters.states import State
from converters.tensors import DType, TensorRef


def parameters(model: State) -> Parameters:
    """All parameters of a checkpoint without ZeRO. ``CheckpointError`` if masters find no name."""
    optimizer = model.root.get("optimizer")
    kept = optimizer if isinstance(optimizer, dict) else {}
    if "fp32_groups_flat" in kept:
        flats = states.tensors(model, kept["fp32_groups_flat"], "fp32_groups_flat")
        return views.complete(model, views.by_view(model, flats), None)
    if "fp32_groups" in kept:
        groups = [
            states.tensors(model, group, f"fp32_groups[{index}]")
            for index, group in enumerate(kept["fp32_groups"])
        ]
        return views.complete(model, _in_order(model, groups), None)
    found = views.complete(model, {}, None)
    if any(ref.dtype in (DType.F16, DType.BF16) for ref in found.frozen.values()):
        found.notes.append("no fp32 master weights are saved: some weights are exact to 16 bits")
    return found


def _in_order(model: State, groups: list[list[TensorRef]]) -> dict[str, TensorRef]:
    """Name to master weight; each group takes the module's tensors in order."""
    from converters import cast

    untied: dict[object, tuple[str, TensorRef]] = {}
    buffers = model.root.get("buffer_names")
    for name, ref in model.module.items():
        if isinstance(ref, TensorRef) and name not in (buffers or ()) and ref.numel:
            untied.setdefault(ref.extents, (name, ref))
    masters: dict[str, TensorRef] = {}
    for index, group in enumerate(groups):
        left = iter(untied.values())
        for position, master in enumerate(group):
            for name, ref in left:
                fits = name not in masters and ref.shape == master.shape
                if fits and cast.rounds_to(master, ref):
                    masters[name] = master
                    break
            else:
                raise CheckpointError(
                    f"{model.path}: fp32 tensor {position} of group {index} "
                    f"{list(master.shape)} rounds to no tensor of module, in the order of the "
                    "model's parameters; without a name it cannot be written",
                    "unsupported",
                )
    return masters
