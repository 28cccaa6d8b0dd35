"""The entries of a file of the universal format on how its parameter is cut up.

Engines of AutoTP know that themselves. Others cut the tensor by these entries, whatever
their number of ranks:

    cat_dim              the axis
    param_n_sub_params   sub-parameters of equal size on it, each cut
    sub_param_shape      the same of sub-parameters of other sizes
    vocab_tensor         rows of zeros are appended where the engine's vocabulary has more

A stack of AutoEP's experts says that it is one (``is_expert_param``), and of how many.

Source: ``load_hp_checkpoint_state`` of DeepSpeed 0.19.8
``checkpoint/universal_checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converters.pickles.values import Call, Global
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.parallel import degrees
from converters.zero.parallel.cuts import Cut, Shape
from converters.zero.parallel.degrees import SubParameters

_SUB_PARAMETERS = Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")


def entries_of(name: str, layout: Cut, is_vocabulary: bool) -> dict[str, Any]:
    """The entries of a parameter that is cut so;
    empty for one that every rank has whole."""
    parts = degrees.sub_parameters(layout)
    if parts is None:  # each rank has all of it, or boxes that none of these entries describes
        return {}

    entries: dict[str, Any] = {"cat_dim": parts.axis}
    if is_vocabulary:
        entries["vocab_tensor"] = True
    if len(parts.widths) > 1 and len(set(parts.widths)) == 1:
        entries["param_n_sub_params"] = len(parts.widths)
    elif len(parts.widths) > 1:
        entries["sub_param_shape"] = _sub_parameters(name, layout.shape, parts)
    return entries


def _sub_parameters(name: str, shape: Shape, parts: SubParameters) -> Call:
    """The object that DeepSpeed keeps of sub-parameters of several sizes."""
    sizes: Mapping[int, Any] = {parts.axis: parts.widths}
    fields = {
        "patterns": [name],
        "shape": tuple(sizes.get(index, size) for index, size in enumerate(shape)),
        "partition_dim": parts.axis,
    }
    return Call(_SUB_PARAMETERS, (), fields, new=True)


def of_stacks(layers: Sequence[AutoEPLayer]) -> dict[str, dict[str, Any]]:
    """The entries of the stacks of experts, by name."""
    return {
        name: {"is_expert_param": True, "ep_num_experts": layer.count}
        for layer in layers
        for name in layer.names
    }
