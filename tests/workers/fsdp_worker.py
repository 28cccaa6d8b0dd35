"""One rank of FSDP2 that goes on from a distributed checkpoint with stock torch, or the Trainer.

fsdp_worker.py JOBS     each {"source", "spec", "steps", "out"}: loads the folder with dcp.load,
                        records what the model and the optimizer hold in OUT/loaded.safetensors,
                        trains on the batches of reshard_worker.py, saves to OUT/dcp with dcp.save.
                        With "trainer" the Trainer resumes from the folder, for two steps
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from fixture_specs import SPECS, WORDS
from fixture_worker import Tiny, param_groups
from reshard_worker import GLOBAL_BATCH
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.fsdp import fully_shard


def whole(value: Any) -> torch.Tensor:
    """A tensor that ranks share, put together. Every rank calls it."""
    full: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def record(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """What is held, under the keys of a fixture's live.safetensors."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"fp32/{name}"] = whole(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = whole(optimizer.state[parameter][key])
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


def go_on(job: dict[str, Any]) -> None:
    """Loads, records, trains and saves."""
    rank, world = dist.get_rank(), dist.get_world_size()
    spec, out = SPECS[job["spec"]], Path(job["out"])
    torch.manual_seed(99)
    model = Tiny(spec)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(param_groups(model, spec.groups), lr=1.0)
    of_model, of_optimizer = state_dicts.get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(states, checkpoint_id=job["source"])
    state_dicts.set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )
    record(model, optimizer, out / "loaded.safetensors")

    losses = []
    done = int(optimizer.state[model.norm.weight]["step"])
    micro = GLOBAL_BATCH // world
    for step in range(done, done + job["steps"]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(WORDS, (GLOBAL_BATCH, 6), generator=generator)
        optimizer.zero_grad()
        loss = model(batch[rank * micro : (rank + 1) * micro])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as DeepSpeed does by default
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
