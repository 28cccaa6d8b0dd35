"""One rank of FSDP2 that goes on from a distributed checkpoint with stock torch.

fsdp_worker.py JOBS     each {"source", "spec", "steps", "out"}: loads the folder with dcp.load,
                        records what the model and the optimizer hold in OUT/loaded.safetensors,
                        trains on the batches of reshard_worker.py, saves to OUT/dcp with dcp.save
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


def record(model: Tiny, optimizer: torch.optim.Optimizer, path: Path) -> None:
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


def main() -> None:
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        go_on(job)
    leave()


if __name__ == "__main__":
    main()
