"""Proof of a conversion to the universal format: by place, as ``proof`` proves.

The finished files are read again, by a reader that knows nothing of the plan, and
everything that it finds is traced through the plan to the bytes it was made from.
These must be the very bytes that the source has for it; what is not a tensor is
compared by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.plan import Plan
from converters.tensors import DType, TensorRef
from converters.torch_files import object_graph
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import checkpoint as merged
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native import model_files, proof
from converters.zero.native.proof import Provenance
from converters.zero.param_groups import ParamGroup
from converters.zero.universal import reader
from converters.zero.universal.plan import (
    common,
    groups_of,
    info,
    parameter_files,
    universal_tag,
)
from converters.zero.universal.reader import INFO


def to_universal(source: Checkpoint, plan: Plan, folder: Path) -> dict[str, int]:
    """Counts of tensors that are equal.

    ``CheckpointError`` names the first thing that is not.
    """
    has_experts = isinstance(source, ExpertsCheckpoint)
    result = reader.read(folder / universal_tag(source), parallel=has_experts)
    inner = result.checkpoint.place.folder / "zero"
    tree = merged.optimizer_root(source, 0)
    groups = groups_of(source)

    provenance = Provenance(plan, folder)
    counts = _prove_same(provenance, source, groups, result.checkpoint, result.groups)
    proof.verify_metadata(provenance, common(source, tree, groups), result.common, set(), inner)

    for name, stem, root in parameter_files(source, groups):
        path = inner / name / f"{stem}.pt"
        result_root = object_graph.read(path).root
        proof.verify_metadata(provenance, {"it": root}, {"it": result_root}, set(), path)

    dense = source.dense if isinstance(source, ExpertsCheckpoint) else source
    source_root = dict(merged.model_root(dense, source.model.path))
    if has_experts:
        source_root[INFO] = object_graph.read_root(source.model.path).get(INFO)
    source_root[INFO] = info(source_root)
    stage_12_path = result.models[0]
    stage_3_path = stage_12_path.with_name(f"zero_pp_rank_0_{stage_12_path.name}")
    for path in (stage_12_path, stage_3_path):
        result_root = object_graph.read_root(path)
        proof.verify_metadata(provenance, source_root, result_root, model_files.DECIDED, path)

    return counts


def _prove_same(
    provenance: Provenance,
    source: Checkpoint,
    source_groups: Sequence[ParamGroup],
    result: Checkpoint,
    result_groups: Sequence[ParamGroup],
) -> dict[str, int]:
    """Proves groups and weights, as trees with one entry for each tensor."""
    path = result.place.folder
    if len(source_groups) != len(result_groups):
        raise CheckpointError(
            f"{path} has {len(result_groups)} param groups, the source {len(source_groups)}"
        )

    for group, result_group in zip(source_groups, result_groups, strict=True):
        proof.verify_metadata(provenance, _group(group), _group(result_group), set(), path)

    trained = {name for group in source_groups for name in group.shapes}
    source_tree, result_tree = _untrained(source, trained), _untrained(result, trained)
    proof.verify_metadata(provenance, source_tree, result_tree, set(), path)

    source_copies, result_copies = _copies(result, source), _copies(result, result)
    proof.verify_metadata(provenance, source_copies, result_copies, set(), path)

    state_counts = [
        len(tensors)
        for group in source_groups
        for key, tensors in group.values.items()
        if key  # that of the weights is empty
    ]
    return {
        "parameters": len(trained),
        "states": sum(state_counts),
        "others": len(source.weights.tensors.keys() - trained),
        "copies": len(result.weights.copies),
    }


def _group(group: ParamGroup) -> dict[str, Any]:
    """A param group: its order, options, constants, and every tensor by name."""
    entries = {
        f"{key or 'fp32'} of {name}": _tree(tensor)
        for key, tensors_by_name in group.values.items()
        for name, tensor in tensors_by_name.items()
    }

    settings = {"the order of parameters": list(group.shapes), "options": group.options}
    return {**settings, "constants": dict(group.constants), **entries}


def _untrained(zero_checkpoint: Checkpoint, trained: set[str]) -> dict[str, Any]:
    """The values that are not trained, and the names."""
    weights = zero_checkpoint.weights
    facts: dict[str, Any] = {
        "tied names": sorted(weights.aliases.items()),
        "names of buffers": sorted(weights.buffers),
        "frozen names": sorted(weights.frozen - trained),
    }

    trees = {name: _tree(tensor) for name, tensor in weights.tensors.items() if name not in trained}
    return facts | trees


def _copies(result: Checkpoint, source: Checkpoint) -> Mapping[str, Any]:
    """What the 16-bit weights of ``result`` are made from, if it is made of ``source``."""
    weights = source.weights
    trees = {}
    for name, reference in result.weights.copies.items():
        tensor = weights.copies.get(name, weights.tensors[name])
        trees[f"16-bit {name}"] = _tree(tensor, reference.dtype)

    return trees


def _tree(tensor: TensorRef, dtype: DType | None = None) -> Call:
    return object_graph.tensor(object_graph.storage(tensor, dtype), tensor.shape)
