"""The entries of universal files on AutoEP's experts,
as ``ds_to_universal.py`` has them.

    zero/NAME.experts.w1/fp32.pt     the stack of all experts, marked as one of experts
    mp_rank_00_model_states.pt       the stacks of the first expert rank in param_shapes, and
                                     ds_autoep_layers, which says that they are its own

An engine cuts its own experts out of the stacks, whatever its number of expert ranks.
Sources: DeepSpeed 0.19.8 ``checkpoint/ds_to_universal.py``
(``_save_zero3_autoep_universal_tensor``), ``checkpoint/universal_checkpoint.py``
(``_resolve_autoep_partition``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.torch_files import object_graph
from converters.zero import partitioning
from converters.zero.files.state_files import Shape
from converters.zero.merging import roots, whole_groups
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native import expert_ranks, model_files
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import ParamGroup

_NAME = "name"  # of a param group of experts: it has the number of expert ranks


def require_stacks(checkpoint: ExpertsCheckpoint) -> None:
    """``CheckpointError`` for DeepSpeed-MoE,
    and for what has groups of two numbers of ranks."""
    if checkpoint.layers:
        return
    raise CheckpointError(
        f"{checkpoint.place.folder} is of DeepSpeed-MoE, which has no universal form that "
        "DeepSpeed loads: each expert rank would take the experts of the first; ckpt reshard "
        "writes it for other ranks and other expert ranks",
        "unsupported",
    )


def without_ranks(groups: Sequence[ParamGroup], limit: int | None) -> list[ParamGroup]:
    """The param groups without what tells of expert ranks.

    DeepSpeed would give their names to the groups of an engine that has another number.
    It loads as many groups as the folder has, and silently leaves those of an engine that
    has more as they are: so they end where those of one expert rank do, which has the most.
    """
    own_groups: list[ParamGroup] = []
    for group in groups:
        if whole_groups.is_expert_group(group):
            nameless = replace(group, options=_without_name(group.options or {}))
            own_groups += expert_ranks.limited(nameless, limit)
        else:
            own_groups.append(group)
    return own_groups


def _without_name(options: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in options.items() if key != _NAME}


def model_root(
    checkpoint: ExpertsCheckpoint,
    models: Sequence[Path],
    groups: Sequence[ParamGroup],
    target: TargetTopology,
) -> dict[Any, Any]:
    """The model file of the target: of the dense model, with the experts of the first
    rank in ``param_shapes``."""
    dense = checkpoint.dense
    root: dict[Any, Any] = next(iter(model_files.model_trees(dense, models, dense.groups, target)))
    source_root = object_graph.read_root(models[0])
    changes: dict[Any, Any] = {
        "param_shapes": [
            object_graph.ordered((name, object_graph.size(shape)) for name, shape in shapes)
            for shapes in _local_shapes(checkpoint, groups, target)
        ],
        roots.INFO: source_root.get(roots.INFO),
    }
    if "shared_params" in source_root:
        changes["shared_params"] = source_root["shared_params"]
    return {**root, **changes}


def _local_shapes(
    checkpoint: ExpertsCheckpoint, groups: Sequence[ParamGroup], target: TargetTopology
) -> Iterator[list[tuple[str, Shape]]]:
    """The shapes on the rank that wrote the model file, by group or sub-group."""
    own_counts = {
        name: len(layer.experts[layer.expert_rank])
        for layer in checkpoint.layers
        for name in layer.names
    }
    for group in groups:
        shapes = {
            name: (own_counts.get(name, shape[0]), *shape[1:]) if shape else shape
            for name, shape in group.shapes.items()
        }
        if target.stage < 3:
            yield list(shapes.items())
            continue
        for names in partitioning.sub_groups(shapes, target.world_size, target.sub_group_size):
            yield [(name, shapes[name]) for name in names]
