"""One rank of trainings with experts by stock DeepSpeed: DeepSpeed-MoE and AutoEP.

experts_worker.py JOBS   each {"model", "out", "stage", "sizes"} and perhaps
    "tp"       tensor-parallel ranks: AutoTP of the model "stacked", Megatron's of "whole" and "cut"
    "pp"       stages of the model "stages"
    "source"   the checkpoint that it goes on from, "universal" one or not
    "reshard"  that of ckpt.resume, which loads it then
    "again"    where it is saved as soon as it is loaded
    "half"     where it is saved after half of its steps
    "seed"     of its first weights
    "limit"    the most elements of a param group of experts on a rank
    "steps"    how many it trains, in two halves where it is saved between them
    "run"      where ckpt.Saver saves it after half of its steps, as parallel_worker does
    "resume"   the run that it goes on from by ckpt.resume

"model" is "single" (DeepSpeed-MoE), "whole" or "cut" (DeepSpeed-MoE with tensor parallelism, whose
experts are not cut, or are), "stages" (DeepSpeed-MoE in a pipeline), or "stacked" (AutoEP).
"sizes" are the expert ranks of each layer; of AutoEP one number. Trains in fp32 on the same global
batches whatever the ranks, and writes OUT/losses.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ending import run_jobs
from parallel_experts import (
    ExpertBlock,
    ModelRanks,
    TensorParallelExperts,
    gather_with_gloo,
    initialise,
)
from parallel_worker import load, save_all
from split_specs import SplitSpec
from split_worker import SIZE, Expert
from torch import nn

import ckpt
from converters.zero.merging import whole_groups

GLOBAL_BATCH = 12  # sequences
EXPERTS, STEPS = 4, 3
TENSOR_PARALLEL = ("whole", "cut")
STAGES = "stages"
PARTITIONING = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*o_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*[qkv]_proj\.weight$"], "partition_type": "column"},
    ],
}


class Experts(nn.Module):
    """Layers of DeepSpeed-MoE, with room for all tokens in each expert."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.inp = nn.Linear(SIZE, SIZE)
        self.blocks = nn.ModuleList(
            MoE(SIZE, Expert(), num_experts=EXPERTS, ep_size=size, k=1, capacity_factor=EXPERTS)
            for size in sizes
        )
        self.out = nn.Linear(SIZE, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inp(torch.sin(ids[..., None] * torch.arange(1, SIZE + 1)))
        for block in self.blocks:
            x = x + block(x)[0]
        return nn.functional.cross_entropy(self.out(x).flatten(0, 1), ids.flatten() % 5)


def stacked() -> Any:
    """A tiny Qwen3-MoE, in which AutoEP stacks the experts."""
    import transformers as hf
    from transformers.utils import output_capturing

    registry = output_capturing._CanRecordRegistry
    own_get = registry.get
    # DeepSpeed 0.19.8 asks it with a default, which transformers 5 does not take
    registry.get = lambda self, key, *_: own_get(self, key)
    config = hf.Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        moe_intermediate_size=8,
        intermediate_size=16,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=EXPERTS,
    )
    return hf.AutoModelForCausalLM.from_config(config)


def loss_of(engine: Any, job: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """The loss of some sequences."""
    if job["model"] in TENSOR_PARALLEL:
        summed: torch.Tensor = engine(torch.sin(ids[..., None] * torch.arange(1, SIZE + 1)))
        return summed
    loss: torch.Tensor = (
        engine(input_ids=ids, labels=ids, use_cache=False).loss
        if job["model"] == "stacked"
        else engine(ids)
    )
    return loss


def tensor_parallel_engine(job: dict[str, Any], config: dict[str, Any]) -> Any:
    """The engine of a model whose dense layers are cut, and its experts or not."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    forget_expert_ranks()
    ranks = ModelRanks(job.get("tp", 1))
    gather_with_gloo(ranks)
    sizes = tuple((EXPERTS, size) for size in job["sizes"])
    is_cut = job["model"] == "cut"
    spec = SplitSpec("moe", job["stage"], 4, "fp32", expert_sizes=sizes, cuts_experts=is_cut)
    model = TensorParallelExperts(spec, ranks)
    initialise(model, ranks.get_model_parallel_rank())
    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(model.parameters()), "name": "all"}]
    )
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=ranks)[0]


def forget_expert_ranks() -> None:
    """DeepSpeed keeps the groups of expert ranks of a process, whose experts are cut or are not."""
    from deepspeed.utils import groups

    for by_name in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        by_name.clear()
    groups.expert_tensor_parallel_world_size = 1


class Lifted(nn.Module):
    """The first layer of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(SIZE, SIZE)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inp(torch.sin(ids[..., None] * torch.arange(1, SIZE + 1)))
        return out


def pipeline_engine(job: dict[str, Any], config: dict[str, Any]) -> Any:
    """The engine of a pipeline with experts in each stage."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.pipe import LayerSpec, PipelineModule

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten() % 5)

    forget_expert_ranks()
    first, second = (LayerSpec(ExpertBlock, Expert(), EXPERTS, size) for size in job["sizes"])
    layers = [LayerSpec(Lifted), first, LayerSpec(nn.Linear, SIZE, SIZE), second]
    layers.append(LayerSpec(nn.Linear, SIZE, 5))
    model = PipelineModule(
        layers,
        num_stages=job["pp"],
        loss_fn=loss,
        partition_method="uniform",
        seed_layers=True,
    )
    initialise(model, 0)
    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(model.parameters()), "name": "all"}]
    )
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def engine_of(job: dict[str, Any]) -> Any:
    """The engine of a job, which has other experts on each expert rank."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    degree = job.get("tp", 1) * job.get("pp", 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (world // degree),
        "zero_optimization": {
            "stage": job["stage"],
            "stage3_param_persistence_threshold": 10,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if job.get("universal"):
        config["checkpoint"] = {"load_universal": True}
    if job["model"] == STAGES:
        return pipeline_engine(job, config)
    if job["model"] in TENSOR_PARALLEL:
        return tensor_parallel_engine(job, config)
    if job.get("tp", 1) > 1:
        config["tensor_parallel"] = {"autotp_size": job["tp"], "partition_config": PARTITIONING}
    seed = job.get("seed", 1234)
    torch.manual_seed(seed)
    if job["model"] == "stacked":
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": job["sizes"][0],
        }
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
        model: nn.Module = stacked()
        parameters = [param for param in model.parameters() if param.requires_grad]
        return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]

    model = Experts(job["sizes"])
    for number, size in enumerate(job["sizes"]):
        torch.manual_seed(seed + 50 + rank % size)
        for name, param in model.named_parameters():
            if f"blocks.{number}.deepspeed_moe.experts" in name:
                nn.init.normal_(param.data, std=0.3)

    groups = split_params_into_different_moe_groups_for_optimizer(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "name": "decay"},
            {
                "params": [p for p in model.parameters() if p.dim() < 2],
                "weight_decay": 0.0,
                "name": "rest",
            },
        ]
    )
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def losses_of(engine: Any, job: dict[str, Any]) -> list[float]:
    """Trains on, and gives the loss of each step over all ranks."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    degree = job.get("tp", 1) * job.get("pp", 1)
    replica, losses = rank // degree, []
    if job["model"] == STAGES:
        replica = rank % (world // degree)
    micro = GLOBAL_BATCH // (world // degree)
    first = engine.global_steps
    for step in range(first, first + job["steps"]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(16, (GLOBAL_BATCH, 6), generator=generator)
        ids = batch[replica * micro : (replica + 1) * micro]
        if job["model"] == STAGES:
            losses.append(float(engine.train_batch(iter([(ids, ids)]))))
            continue
        loss = loss_of(engine, job, ids)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def train(job: dict[str, Any]) -> None:
    if "limit" in job:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        split_params_into_different_moe_groups_for_optimizer.__defaults__ = (job["limit"],)
        whole_groups.GROUP_NUMEL = job["limit"]
    engine, out = engine_of(job), Path(job["out"])
    job.setdefault("steps", 2 * STEPS if "half" in job else STEPS)
    if "source" in job:
        load(engine, job)
        engine.save_checkpoint(job["again"])
    losses: list[float] = []
    if "half" in job:
        job["steps"] //= 2
        losses += losses_of(engine, job)
        engine.save_checkpoint(job["half"])
    if "run" in job:
        save_all(engine, job["run"])
    if "resume" in job:
        assert ckpt.resume(engine, job["resume"]) > 0
    losses += losses_of(engine, job)
    if torch.distributed.get_rank() == 0:
        out.mkdir()
        (out / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    engine.destroy()


if __name__ == "__main__":
    run_jobs(train)
