"""One rank of FSDP or DDP that goes on from a distributed checkpoint with stock torch, or the
Trainer.

fsdp_worker.py JOBS     each {"source", "spec", "steps", "out"}: loads the folder with dcp.load,
                        records what the model and the optimizer hold in OUT/loaded.safetensors,
                        trains on the batches of reshard_worker.py, saves to OUT/dcp with dcp.save.
                        "wrapper" is fully_shard by default, or FullyShardedDataParallel (with
                        SHARDED_STATE_DICT) or DistributedDataParallel. With "trainer" the Trainer
                        resumes from the folder, for two steps
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from fixture_specs import SPECS, WORDS, Spec
from fixture_worker import Tiny, param_groups
from reshard_worker import GLOBAL_BATCH
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

SHARDED = (
    StateDictType.SHARDED_STATE_DICT,
    ShardedStateDictConfig(),
    ShardedOptimStateDictConfig(),
)


def whole(value: Any) -> torch.Tensor:
    """A tensor that ranks share, put together on rank 0. Every rank calls it."""
    if isinstance(value, ShardedTensor):
        gathered = torch.zeros(value.size(), dtype=value.dtype)
        value.gather(0, out=gathered if dist.get_rank() == 0 else None)
        return gathered
    full: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def record(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """What is held, under the keys of a fixture's live.safetensors."""
    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    tensors = {}
    for name, state in of_optimizer["state"].items():
        tensors[f"fp32/{name}"] = whole(of_model[name])
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = whole(state[key])
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


def wrapped(model: Tiny, wrapper: str) -> torch.nn.Module:
    """The model as a training with this wrapper has it."""
    match wrapper:
        case "FullyShardedDataParallel":
            policy = ModuleWrapPolicy({type(model.blocks[0])})
            cpu = torch.device("cpu")
            return FullyShardedDataParallel(
                model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu
            )
        case "DistributedDataParallel":
            return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def groups_of(model: torch.nn.Module, spec: Spec) -> list[dict[str, Any]]:
    """The groups of a model that is wrapped, by the shapes of one that is not: FSDP1 makes
    vectors of all parameters, and keeps their order."""
    plain = Tiny(spec)
    groups: list[dict[str, Any]] = param_groups(plain, spec.groups)
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    counterparts = {id(parameter): counterpart for parameter, counterpart in pairs}
    return [{**g, "params": [counterparts[id(p)] for p in g["params"]]} for g in groups]


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, source: str) -> None:
    """Loads a folder as torch says to for the wrapper of the model."""
    if isinstance(model, FullyShardedDataParallel):
        load_sharded(model, optimizer, source)
        return

    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(states, checkpoint_id=source)
    state_dicts.set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )


def load_sharded(
    model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer, source: str
) -> None:
    """Loads a folder into FSDP1's SHARDED_STATE_DICT, the optimizer by its own function."""
    with FullyShardedDataParallel.state_dict_type(model, *SHARDED):
        states = {"model": model.state_dict()}
        dcp.load(states, checkpoint_id=source)
        model.load_state_dict(states["model"])
        of_optimizer = load_sharded_optimizer_state_dict(
            model_state_dict=states["model"],
            optimizer_key="optimizer",
            storage_reader=dcp.FileSystemReader(source),
        )
        optimizer.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model, optimizer, of_optimizer["optimizer"]
            )
        )


def go_on(job: dict[str, Any]) -> None:
    """Loads, records, trains and saves."""
    rank, world = dist.get_rank(), dist.get_world_size()
    spec, out = SPECS[job["spec"]], Path(job["out"])
    torch.manual_seed(99)
    model = wrapped(Tiny(spec), job.get("wrapper", "fully_shard"))
    optimizer = torch.optim.AdamW(groups_of(model, spec), lr=1.0)
    load(model, optimizer, job["source"])
    record(model, optimizer, out / "loaded.safetensors")

    losses = []
    # of FSDP1 a rank has the states of what lies in its part of a vector
    done = int(max(state["step"] for state in optimizer.state.values() if state))
    micro = GLOBAL_BATCH // world
    for step in range(done, done + job["steps"]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(WORDS, (GLOBAL_BATCH, 6), generator=generator)
        optimizer.zero_grad()
        loss = model(batch[rank * micro : (rank + 1) * micro])
        loss.backward()
        if isinstance(model, FullyShardedDataParallel):  # 1.0 is DeepSpeed's default
            model.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)

    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=out / "dcp")
    record(model, optimizer, out / "live.safetensors")
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))


def resume_trainer(job: dict[str, Any]) -> None:
    """The Trainer with FSDP2 resumes, and records what it holds when training begins.

    Accelerate wraps a model with FSDP where there are GPUs: here it is told that there are.
    """
    import transformers as hf
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    source, out = job["source"], Path(job["out"])
    config = hf.AutoConfig.from_pretrained(source)
    arguments = hf.TrainingArguments(
        str(out),
        max_steps=4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        fsdp="full_shard",
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    )
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    facts: dict[str, Any] = {}

    class Recorder(hf.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            inner = trainer.optimizer.optimizer
            record(trainer.model, inner, out / "loaded.safetensors")
            facts["step"] = trainer.state.global_step
            facts["scheduler"] = trainer.lr_scheduler.state_dict()["last_epoch"]
            facts["rates"] = [group["initial_lr"] for group in inner.param_groups]

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (32, 8)).tolist()]
    trainer = hf.Trainer(
        hf.LlamaForCausalLM(config).float(), arguments, train_dataset=rows, callbacks=[Recorder()]
    )
    trainer.train(resume_from_checkpoint=source)
    facts["last_step"] = trainer.state.global_step
    if dist.get_rank() == 0:
        (out / "facts.json").write_text(json.dumps(facts))


def main() -> None:
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job.get("trainer"):
            resume_trainer(job)
        else:
            go_on(job)
    leave()


if __name__ == "__main__":
    main()
