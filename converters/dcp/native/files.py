"""DeepSpeed's native files of a training that FSDP saved, planned,
and the proof of them.

TAG/bf16_zero_pp_rank_R_mp_rank_00_optim_states.pt    one a rank
TAG/mp_rank_00_model_states.pt                        stages 1 and 2
TAG/zero_pp_rank_R_mp_rank_00_model_states.pt         stage 3, one a rank
"""

from __future__ import annotations

from pathlib import Path

from converters.dcp.native import roots
from converters.dcp.native.training import FsdpTraining
from converters.errors import CheckpointError
from converters.plan import Plan
from converters.tensors import DType
from converters.torch_files import file_plan
from converters.zero import checkpoint
from converters.zero.native import proof
from converters.zero.native.target import TargetTopology


def tag_of(training: FsdpTraining) -> str:
    """The tag, as DeepSpeed names one by itself."""
    return f"global_step{training.step}"


def plan(training: FsdpTraining, target: TargetTopology, dtype: DType) -> Plan:
    """The files, named relative to the save_dir.
    ``dtype`` is what the engine computes in."""
    tag = tag_of(training)
    prefix = "bf16_" if dtype is DType.BF16 else ""
    shards = [
        file_plan.shard(f"{tag}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", root)
        for rank, root in enumerate(roots.optimizer_roots(training, target, dtype))
    ]
    for rank, root in enumerate(roots.model_roots(training, target, dtype)):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if target.stage == 3 else "mp_rank_00"
        shards.append(file_plan.shard(f"{tag}/{name}_model_states.pt", root))

    total = sum(placement.nbytes for shard in shards for placement in shard.placements)
    return Plan(tuple(shards), None, total, {}, training.checksums)


def verify(
    training: FsdpTraining, target: TargetTopology, file_plan: Plan, folder: Path
) -> dict[str, int]:
    """Counts of tensors that are equal, as ``zero.native.proof`` proves them.

    ``CheckpointError`` names the first thing that is not.
    """
    result = checkpoint.read(folder / tag_of(training))
    if (result.stage, result.world_size) != (target.stage, target.world_size):
        raise CheckpointError(f"{folder} reads as stage {result.stage} of {result.world_size}")
    return proof.verify_tensors(training.source, training.groups, result, file_plan, folder)
