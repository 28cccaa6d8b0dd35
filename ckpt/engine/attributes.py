"""The attributes of DeepSpeed that this folder relies on, as one table.

After an upgrade of DeepSpeed, ``missing()`` names those that its sources do not define
any more, in a second and without an engine:

    python -c "from ckpt.engine import attributes; attributes.require()"

A line of ``TABLE`` is a source file of DeepSpeed, a class in it ("-": the module), and
names that are defined there: methods, properties, fields, what is assigned to ``self``
or a parameter, or the text of a constant, by which DeepSpeed sets an attribute. A name
in brackets is one that older versions lack and that is asked for before it is used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from converters.errors import CheckpointError

VERSION = "0.19.8"  # in which they were read
TABLE = """
runtime/engine.py DeepSpeedEngine
    optimizer lr_scheduler checkpoint_engine config device global_rank
    global_steps global_samples micro_steps skipped_steps get_lr
    save_checkpoint load_checkpoint _save_checkpoint _save_zero_checkpoint
    save_zero_checkpoint save_non_zero_checkpoint
    _get_ckpt_name _get_zero_ckpt_name _get_zero_param_shapes
    loaded_checkpoint_dp_world_size load_universal_checkpoint
    zero_optimization zero_optimization_stage zero_sub_group_size zero_load_from_fp32_weights
    zero_cpu_offload (zero_nvme_offload_optimizer) zero_gather_16bit_weights_on_model_save
    bfloat16_enabled fp16_enabled use_node_local_storage
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    mp_world_size has_moe_layers mpu seq_data_parallel_group _save_moe_checkpoint _config
    (zero_parameter_alignment) (managed_gradient_accumulation)
runtime/config.py DeepSpeedConfig
    _param_dict zero_config
runtime/zero/config.py DeepSpeedZeroConfig
    pipeline_loading_checkpoint
runtime/zero/stage_1_and_2.py DeepSpeedZeroOptimizer
    optimizer loss_scaler dynamic_loss_scale overflow clip_grad
    bit16_groups round_robin_bit16_groups single_partition_of_fp32_groups
    real_dp_process_group update_lp_params
    (round_robin_bit16_offsets) (round_robin_bit16_meta)
runtime/zero/stage3.py DeepSpeedZeroOptimizer_Stage3
    optimizer loss_scaler dynamic_loss_scale overflow clip_grad
    fp16_groups fp32_partitioned_groups_flat sub_group_to_group_id
    checkpoint_event_epilogue optimizer_swapper _swappable_optimizer_subgroup
    _optimizer_states_and_gradient_swap_in (_release_swap_buffers)
    (sub_group_process_groups) (use_muon)
runtime/zero/partition_parameters.py Init
    ds_id ds_shape ds_numel ds_tensor ds_process_group ds_quant_scale
    partition_numel nvme_swapper status
runtime/swap_tensor/partitioned_param_swapper.py AsyncPartitionedParameterSwapper
    swap_in remove_partition_and_release_buffers
runtime/swap_tensor/optimizer_utils.py OptimizerSwapper
    swap_folder
runtime/bf16_optimizer.py BF16_Optimizer
    optimizer clip_grad bf16_groups fp32_groups_flat_partition real_dp_process_group
    update_lp_params
runtime/fp16/fused_optimizer.py FP16_Optimizer
    optimizer clip_grad overflow fp16_groups fp32_groups_flat (loss_scale_config)
runtime/fp16/unfused_optimizer.py FP16_UnfusedOptimizer
    optimizer clip_grad overflow fp16_groups fp32_groups (loss_scale_config)
runtime/fp16/loss_scaler.py LossScaleConfig
    (dynamic_loss_scale) (cur_scale) (cur_iter) (last_overflow_iter) (scale_factor) (scale_window)
runtime/checkpoint_engine/checkpoint_engine.py CheckpointEngine
    create save load commit makedirs
runtime/pipe/engine.py PipelineEngine
    grid
runtime/pipe/module.py PipelineModule
    partitions _layer_specs
runtime/pipe/module.py TiedLayerSpec
    key
runtime/pipe/topology.py PipelineParallelGrid
    get_pipe_parallel_world_size get_stage_id
    get_slice_parallel_rank get_slice_parallel_world_size
moe/layer.py MoE
    ep_size expert_group_name num_local_experts deepspeed_moe
moe/experts.py Experts
    allreduce group_name
module_inject/auto_ep_layer.py AutoEPMoELayer
    (ep_group_name) (expert_placement_descriptor) (allreduce) (group_name)
checkpoint/constants.py -
    universal_checkpoint_info (ds_autoep_uc_meta)
ops/adam/cpu_adam.py DeepSpeedCPUAdam
    adam_w_mode
ops/adam/fused_adam.py FusedAdam
    adam_w_mode
utils/groups.py -
    _get_model_parallel_world_size _get_sequence_parallel_world_size
    _get_expert_data_parallel_group _get_expert_parallel_rank
"""


@dataclass(frozen=True, slots=True)
class Attribute:
    """A name that ``owner``, a class in the source ``file`` of DeepSpeed, has.

    ``owner`` is "" for a function or a constant of the module. ``optional``: older
    versions lack it.
    """

    file: str
    owner: str
    name: str
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} ({self.file})".removeprefix(".")


def relied_on() -> tuple[Attribute, ...]:
    """Every attribute of DeepSpeed that ``ckpt`` reads, calls or replaces."""
    attributes = []
    file = owner = ""
    for line in TABLE.strip().splitlines():
        words = line.split()
        if not line.startswith(" "):
            file, owner = words[0], words[1].removeprefix("-")
            continue

        for word in words:
            name = word.strip("()")
            attributes.append(Attribute(file, owner, name, word != name))

    return tuple(attributes)


def missing(root: Path | None = None, optional: bool = False) -> list[Attribute]:
    """The attributes that the DeepSpeed in ``root`` (its package; the installed one)
    does not define.

    With ``optional`` those too that may be missing.
    """
    root = _package() if root is None else root
    files = {attribute.file for attribute in relied_on()}
    defined = {file: _names_by_class(root / file) for file in files}
    return [
        attribute
        for attribute in relied_on()
        if (optional or not attribute.optional)
        and attribute.name not in defined[attribute.file].get(attribute.owner, set())
    ]


def require() -> None:
    """``CheckpointError`` unless the installed
    DeepSpeed has every attribute that is needed."""
    if lacks := missing():
        names = ", ".join(map(str, lacks[:5]))
        and_more = f" and {len(lacks) - 5} more" if len(lacks) > 5 else ""
        raise CheckpointError(
            f"{_package()}: this version of DeepSpeed does not define {names}{and_more}, "
            "which ckpt relies on; install the version that ckpt was tested with, or a "
            "newer ckpt",
            "unsupported",
        )


@cache
def require_of_other_version() -> None:
    """``require``, once a process, where DeepSpeed is of another version than
    ``VERSION``: its sources are read, which takes 0.3 seconds."""
    if find_spec("deepspeed") is None:
        return  # what is asked is no engine of DeepSpeed's

    try:
        release = version("deepspeed")
    except PackageNotFoundError:  # a copy of a source tree
        release = ""
    if release != VERSION:
        require()


def _package() -> Path:
    """The folder of the installed DeepSpeed, which is not imported."""
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        raise CheckpointError("DeepSpeed is not installed; pip install deepspeed", "unsupported")
    return Path(spec.origin).parent


def _names_by_class(path: Path) -> dict[str, set[str]]:
    """The names that each class of a source file defines, and under "" the module's own."""
    if not path.is_file():
        return {}

    names: dict[str, set[str]] = {"": set()}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = set(_definitions(node))
        elif isinstance(node, ast.FunctionDef):
            names[""].add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names[""].add(str(node.value.value))  # the name of an attribute, as a text

    return names


def _definitions(owner: ast.ClassDef) -> Iterator[str]:
    """Methods, fields,
    and whatever the class assigns to an attribute, its own or another's."""
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
