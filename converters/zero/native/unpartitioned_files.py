"""A checkpoint for an engine in fp32 without ZeRO, as a plan of DeepSpeed's files.

    mp_rank_MM_model_states.pt   the state dict in fp32, and torch's optimizer, by number

It has neither partitions nor names of the optimizer's parameters: their numbers follow
the param group. Source: DeepSpeed 0.19.8 ``runtime/engine.py``
(``_common_checkpoint_state``), torch 2.13 ``optim/optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.options import STAGE
from converters.plan import Plan
from converters.tensors import DType
from converters.torch_files import file_plan, object_graph
from converters.zero import checkpoint as zero
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import numbered_group
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_parallel import lanes_of
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import model_files, proof, reshard
from converters.zero.native.target import TargetTopology
from converters.zero.parallel import reader as parallel_reader
from converters.zero.param_groups import WEIGHTS, ParamGroup

Tree = dict[Any, Any]
ABSENT = ("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


def require(checkpoint: Checkpoint, groups: list[ParamGroup]) -> None:
    """Raises for what an engine without ZeRO does not load, or what its files do not say."""
    weights = checkpoint.weights
    trained = [tensor for group in groups for tensor in group.values[WEIGHTS].values()]
    types = {tensor.dtype for tensor in (*trained, *weights.copies.values())}
    is_fp32 = types == {DType.F32} and not reshard.bf16(checkpoint.model)
    frozen = weights.frozen - weights.buffers
    if isinstance(checkpoint, ExpertsCheckpoint):
        reason = "is of experts, which are not written without ZeRO"
    elif not is_fp32 or checkpoint.model.setting("fp16", "enabled") is True:
        reason = "was trained in 16 bits, and only fp32 is written without ZeRO"
    elif len(groups) != 1 or groups[0].options is None or frozen:
        reason = (
            "has several param groups or frozen parameters, and without ZeRO the optimizer has "
            "numbers in the place of names: the result could not be read again"
        )
    else:
        return
    raise CheckpointError(f"{checkpoint.place.folder} {reason}; name {STAGE} 1", "unsupported")


def plan(
    checkpoint: Checkpoint, topology: TargetTopology, tensor_ranks: TensorRanks | None
) -> Plan:
    """The files of the tag, named relative to the save_dir; reads pickles."""
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        require(checkpoint, merged.groups_of(checkpoint))
        folder = reshard.tag_folder(checkpoint)
        return file_plan.plan(
            [
                file_plan.shard(
                    f"{folder}/mp_rank_{number:02d}_model_states.pt", _root(lane, topology)
                )
                for number, lane in enumerate(reshard.by_tensor_rank(checkpoint, tensor_ranks))
            ]
        )


def _root(lane: Checkpoint, topology: TargetTopology) -> Tree:
    """The root of the file of a tensor-parallel rank."""
    root = merged.model_root(lane, merged.model_paths(lane)[0])
    (group,) = merged.groups_of(lane)
    nodes = dict(_module(lane, root, group))
    changes: Tree = {
        "module": object_graph.replaced(root["module"], nodes),
        "optimizer": optimizer_of(group),
        "dp_world_size": topology.world_size,
        **dict.fromkeys(ABSENT),
    }
    return reshard.configured({**root, **changes}, topology)


def _module(lane: Checkpoint, root: Tree, group: ParamGroup) -> Iterator[tuple[str, Any]]:
    """The state dict: trained weights as the optimizer has them, everything else as it is."""
    trained: dict[str, Any] = {}
    for name, node in object_graph.pairs(root["module"]):
        owner = lane.weights.aliases.get(name, name)
        tensor = group.values[WEIGHTS].get(owner)
        if tensor is None:
            yield name, node
            continue
        if owner not in trained:
            storage = object_graph.storage(tensor.view(tensor.numel))
            trained[owner] = object_graph.tensor(storage, tensor.shape)
        yield name, trained[owner]


def optimizer_of(group: ParamGroup) -> Tree:
    """The ``state_dict`` of torch's optimizer."""
    states: dict[int, Tree] = {}
    for number, name in enumerate(group.shapes):
        state: Tree = {}
        for key in group.keys:
            tensor = group.values[key][name] if key in group.values else None
            if tensor is None:
                state[key] = object_graph.copied(group.constants[key])
            else:
                storage = object_graph.storage(tensor.view(tensor.numel))
                state[key] = object_graph.tensor(storage, tensor.shape)
        states[number] = state

    options = {**(group.options or {}), "params": list(states)}
    return {"state": states, "param_groups": [options]}


def prove(
    checkpoint: Checkpoint,
    topology: TargetTopology,
    native_plan: Plan,
    output: Path,
    tensor_ranks: TensorRanks | None,
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    folder = output / reshard.tag_folder(checkpoint)
    if tensor_ranks is None:
        results = [zero.read(folder)]
    else:
        model = parallel_reader.read(folder, complete=True)
        proof.verify_cuts(model, tensor_ranks.layouts)
        results = lanes_of(model)

    provenance = proof.Provenance(native_plan, output)
    counts: Counter[str] = Counter()
    lanes = reshard.by_tensor_rank(checkpoint, tensor_ranks)
    for lane, result in zip(lanes, results, strict=True):
        if (result.stage, result.world_size) != (0, topology.world_size):
            raise CheckpointError(f"{output} reads as stage {result.stage}; {proof.BUG}")
        groups = merged.groups_of(lane)
        numbered = numbered_group.merged_lane(result)
        counts.update(proof.verify_tensors(lane, groups, numbered, native_plan, output))
        source_root = merged.model_root(lane, merged.model_paths(lane)[0])
        result_root = object_graph.read_root(result.model.path)
        decided_keys = {*model_files.DECIDED, "optimizer"}
        proof.verify_metadata(provenance, source_root, result_root, decided_keys, result.model.path)
    return {key: count // len(results) for key, count in counts.items()}
