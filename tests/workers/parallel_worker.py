"""One rank of trainings with tensor parallelism, a pipeline or ZeRO alone, by stock DeepSpeed.

parallel_worker.py JOBS   each {"model", "out", "stage", "steps"} and perhaps
    "tp"         tensor-parallel ranks (AutoTP)
    "pp"         stages; of the models "pipeline" and "split" alone. 0: the engine of a plain
                 module. Of "split" a stage has "tp" ranks, which cut as Megatron does
    "source"     the checkpoint that it goes on from, "universal" one or not
    "reshard"    that of ckpt.resume, which loads it then
    "again"      where it is saved as soon as it is loaded
    "half"       where it is saved after half of its steps
    "seed"       of its first weights
    "bf16"       true where it is trained in bf16
    "clipping"   of gradients; DeepSpeed's default is to 1, in fp32 without ZeRO by a norm that
                 depends on the number of stages
    "run"        where ckpt.Saver saves it then, too; live weights go to RUN-fp32
    "resume"     the run that it goes on from by ckpt.resume
    "local"      nodes have folders of their own; {node} in "run" and "resume" is this one's
    "refused"    what the error of ckpt.resume says, or that of ckpt.Saver; nothing is trained

Trains on the same global batches whatever the ranks, saves to OUT and writes OUT/losses.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import split_pipelines
import torch
import uneven_heads
from ending import run_jobs
from parallel_experts import ModelRanks
from torch import nn

import ckpt
from ckpt import live

GLOBAL_BATCH = 12  # sequences
WORDS, HIDDEN = 32, 16
HEAD, GROUP = 4, 2  # width of a head, query heads to a key head
PARTITIONING = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\bo\.weight$", r".*down\.weight$"], "partition_type": "row"},
        {
            "patterns": [r".*qkv\.weight$"],
            "partition_type": "column",
            "shape": [[32, 16, 16], -1],
            "partition_dim": 0,
        },
        {
            "patterns": [r".*gate_up\.weight$"],
            "partition_type": "column",
            "shape": [2, -1],
            "partition_dim": 0,
        },
    ],
}


class Fused(nn.Module):
    """A block whose widths are those of its shards: fused qkv with grouped heads, fused gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 64)
        self.o = nn.Linear(32, HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 48)
        self.down = nn.Linear(24, HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        width = self.qkv(self.norm(x))
        q, k, v = width.split([width.shape[-1] // 2, *[width.shape[-1] // 4] * 2], -1)
        heads = q.unflatten(-1, (-1, GROUP, HEAD)) * torch.tanh(k * v).unflatten(-1, (-1, 1, HEAD))
        x = x + self.o(heads.flatten(-3)) * self.scale
        gate, up = self.gate_up(x).chunk(2, -1)
        x = x + self.down(nn.functional.silu(gate) * up)
        return nn.functional.cross_entropy(
            self.head(x)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )


class Words(nn.Module):
    """A tied module: the embedding, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.words(ids)
        return out


class Layer(nn.Module):
    """A layer of a pipeline, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + torch.tanh(self.up(self.norm(x))) * self.scale
        return out


def head(module: Words, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, module.words.weight)


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Unsplit(nn.Module):
    """The pipeline's model as a plain module, its parameters under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": Words()})
        for number in (1, 2, 3):
            self.add_module(str(number), Layer())
        self.add_module("4", nn.LayerNorm(HIDDEN))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tied_modules["embed"](ids)
        for number in (1, 2, 3, 4):
            x = getattr(self, str(number))(x)
        return loss_of(head(self.tied_modules["embed"], x), ids)


def config_of(job: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration of a job."""
    replicas = torch.distributed.get_world_size() // (job.get("tp", 1) * max(job.get("pp", 1), 1))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // replicas,
        "zero_optimization": {
            "stage": job["stage"],
            "stage3_param_persistence_threshold": 10,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if job.get("tp", 1) > 1 and job["model"] in ("fused", "heads"):
        of_model = PARTITIONING if job["model"] == "fused" else uneven_heads.PARTITIONING
        partitioning = {"partition_config": of_model}
        config["tensor_parallel"] = {"autotp_size": job["tp"], **partitioning}
    if "clipping" in job:
        config["gradient_clipping"] = job["clipping"]
    if job.get("bf16"):
        config["bf16"] = {"enabled": True}
    if job.get("universal"):
        config["checkpoint"] = {"load_universal": True}
    if job.get("local"):
        config["checkpoint"] = {"use_node_local_storage": True}
    return config


def model_of(job: dict[str, Any]) -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    torch.manual_seed(job.get("seed", 1234))
    if job["model"] in ("fused", "heads"):
        is_fused = job["model"] == "fused"
        return Fused() if is_fused else uneven_heads.UnevenHeads(WORDS, HIDDEN, HEAD, inner=25)
    if job["model"] == "split":
        ranks = job.get("tp", 1)
        if job.get("pp"):
            return split_pipelines.pipeline(job["pp"], ranks)
        return split_pipelines.Unsplit(ModelRanks(ranks))
    if not job.get("pp"):
        return Unsplit()

    layers = [
        TiedLayerSpec("embed", Words, tied_weight_attr="words.weight"),
        *(LayerSpec(Layer) for _ in range(3)),
        LayerSpec(nn.LayerNorm, HIDDEN),
        TiedLayerSpec("embed", Words, forward_fn=head, tied_weight_attr="words.weight"),
    ]
    model: nn.Module = PipelineModule(
        layers, num_stages=job["pp"], loss_fn=loss_of, partition_method="uniform", seed_layers=True
    )
    return model


def losses_of(engine: Any, job: dict[str, Any]) -> list[float]:
    """Trains on, and gives the loss of each step over all ranks."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    replicas = world // (job.get("tp", 1) * max(job.get("pp", 1), 1))
    replica = rank // job.get("tp", 1) % replicas
    micro, losses = GLOBAL_BATCH // replicas, []
    first = engine.global_steps
    for step in range(first, first + job["steps"]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(WORDS, (GLOBAL_BATCH, 6), generator=generator)
        ids = batch[replica * micro : (replica + 1) * micro]
        if job.get("pp"):
            losses.append(float(engine.train_batch(iter([(ids, ids)]))))
            continue
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def load(engine: Any, job: dict[str, Any]) -> None:
    """Loads the source of a job, by DeepSpeed or by ckpt."""
    if "reshard" in job:
        step = ckpt.resume(engine, job["source"], reshard=job["reshard"])
        assert step == engine.global_steps > 0
        return
    path, _ = engine.load_checkpoint(job["source"])
    assert path is not None


def save_all(engine: Any, run: str) -> None:
    """Saves a checkpoint with weights into a run, and the live weights beside it.

    Of AutoEP the live state dict, too, whose names are those of the engine.
    """
    with ckpt.Saver(engine, run, weights="bf16") as saver:
        saver.save(engine.global_steps)
    live.save_fp32(engine, f"{run}-fp32", max_shard_size="4kB")
    if any(name.endswith(".w1") for name, _ in engine.module.named_parameters()):
        state = live.fp32_state_dict(engine)
        if state is not None:
            torch.save(state, f"{run}.pt")


def require_refusal(engine: Any, job: dict[str, Any]) -> None:
    """Fails unless the engine's saver, or its resume, is refused with the words of the job."""
    try:
        if "resume" in job:
            ckpt.resume(engine, job["resume"])
        else:
            ckpt.Saver(engine, job["run"])
    except ckpt.CheckpointError as error:
        assert job["refused"] in str(error), error
    else:
        raise AssertionError(f"it was not refused: {job}")


def train(job: dict[str, Any]) -> None:
    import deepspeed

    for name in {"run", "resume"} & job.keys():
        job[name] = job[name].format(node=os.environ["GROUP_RANK"])
    model, out = model_of(job), Path(job["out"])
    config = config_of(job)
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=model.tied_modules["embed"].ranks if type(model) is split_pipelines.Unsplit else None,
        model_parameters=[param for param in model.parameters() if param.requires_grad],
        config={**config, "optimizer": optimizer},
    )
    is_split = job["model"] == "split" and job.get("tp", 1) > 1
    client_state = {"universal_checkpoint_info": split_pipelines.INFO} if is_split else {}
    if "refused" in job:
        require_refusal(engine, job)
        engine.destroy()
        return
    if "source" in job:
        load(engine, job)
    if "again" in job:
        engine.save_checkpoint(job["again"], client_state=client_state)
    if "resume" in job:
        assert ckpt.resume(engine, job["resume"]) > 0
    losses: list[float] = []
    if "half" in job:
        job["steps"] //= 2
        losses += losses_of(engine, job)
        engine.save_checkpoint(job["half"], client_state=client_state)
    if "run" in job:
        save_all(engine, job["run"])
    losses += losses_of(engine, job)
    engine.save_checkpoint(str(out), client_state=client_state)
    if torch.distributed.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    engine.destroy()


if __name__ == "__main__":
    run_jobs(train)
