"""One rank of a training of plain torch (FSDP2, DDP, or alone) that is saved and resumed.

torch_worker.py JOBS     each {"does", "mode", ...}: a function of this module and its arguments

What a training holds is told as whole tensors, so that two of different ranks can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ending import leave
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ckpt
from converters.errors import CheckpointError

WORDS, WIDTH = 40, 9
RATES = [2, (1e-2 * (1 / 3), 0.1), (1e-2 * (1 / 3), 0.0)]  # at step 2: epoch, and by group
State = dict[str, torch.Tensor]


class Small(nn.Module):
    """Tied weights, a buffer, a frozen parameter, rows that ranks share unevenly, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.wide = nn.Linear(WIDTH, width)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.rand(3, WIDTH), requires_grad=False)
        self.register_buffer("places", torch.arange(5))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(words) + self.frozen.sum()
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        hidden = self.drop(hidden)
        return self.head(hidden).logsumexp(-1).mean() + self.wide(hidden).square().mean()


class Training:
    """A model with its optimizer and scheduler, as a loop of a user has them."""

    def __init__(self, mode: str, seed: int = 0, width: int = 7) -> None:
        torch.manual_seed(seed)
        model: Any = Small(width)
        if mode == "fsdp2":
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        if mode == "ddp":
            model = DistributedDataParallel(model)

        trained = [value for value in model.parameters() if value.requires_grad]
        matrices = {"params": [value for value in trained if value.dim() > 1], "weight_decay": 0.1}
        vectors = {"params": [value for value in trained if value.dim() < 2], "weight_decay": 0.0}
        self.model = model
        self.optimizer = torch.optim.AdamW([matrices, vectors], lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _rate)
        torch.manual_seed(100 + _rank())

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, first: int, last: int) -> list[float]:
        """Losses of the steps; every rank has the same batch, and dropout of its own."""
        losses = []
        for step in range(first, last + 1):
            batch = torch.randint(WORDS, (4, 6), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = self.model(batch)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self) -> State:
        """All that is held, whole. Every rank calls it."""
        parts: Any = state_dicts.get_state_dict(self.model, self.optimizer)
        of_model, of_optimizer = parts
        tensors = {f"model/{name}": value for name, value in of_model.items()}
        for name, values in of_optimizer["state"].items():
            tensors |= {f"{name}/{key}": value for key, value in values.items()}
        return {name: _whole(value).clone() for name, value in tensors.items()}

    def rates(self) -> list[Any]:
        groups = self.optimizer.param_groups
        return [
            self.scheduler.last_epoch,
            *((group["lr"], group["weight_decay"]) for group in groups),
        ]


class Sampler:
    """Something of the user's that has a place to go on from."""

    def __init__(self, place: int) -> None:
        self.place = place

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def _rate(step: int) -> float:
    return 1 / (1 + step)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _whole(value: Any) -> torch.Tensor:
    full: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach()


def require_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def save(mode: str, out: str, truth: str) -> None:
    """Saves at step 2 behind the training's back and at step 4; the losses are as without."""
    undisturbed = Training(mode).train(1, 4)

    training = Training(mode)
    extra = {"sampler": Sampler(10 + _rank())}
    saver = ckpt.Saver(**training.parts, run=out, background=True, weights="bf16")
    losses = training.train(1, 2)
    held = training.state()
    saver.save(2, {"eval_loss": 1.5}, {"epoch": 7}, extra)
    losses += training.train(3, 3)  # what is written meanwhile is that of step 2
    while saver.flight is not None:  # committed by step alone
        saver.step(3)
        time.sleep(0.01)
    saver.save(3, tier="weights")
    losses += training.train(4, 4)
    saver.save(4, client_state={"epoch": 8}, extra=extra)
    saver.close()

    assert losses == undisturbed, (losses, undisturbed)
    predicted, saved = saver.predicted or 0, Path(out, f"checkpoint-2/__{_rank()}_0.distcp").stat()
    assert predicted >= saved.st_size * 0.9
    if not _rank():
        save_file(held, truth)


def resume(mode: str, source: str, truth: str, ranks: int) -> None:
    """Resumes at step 2, on other ranks than the ``ranks`` that saved, or on these."""
    own_ranks = dist.get_world_size() if dist.is_initialized() else 1
    training, client_state, sampler = Training(mode, seed=9), {"mine": 1}, Sampler(0)
    step = ckpt.resume(
        **training.parts,
        run=source,
        tag="checkpoint-2",
        extra={"sampler": sampler},
        client_state=client_state,
        verify="data",
    )
    assert step == 2 and client_state == {"mine": 1, "epoch": 7}
    require_same(training.state(), load_file(truth))
    assert training.rates() == RATES
    assert sampler.place == (10 + _rank() if _rank() < ranks else 0)
    if own_ranks == ranks:
        losses = training.train(3, 4)
        assert losses == Training(mode).train(1, 4)[2:]


def load_with_torch(mode: str, source: str, truth: str) -> None:
    """Stock torch loads the folder, and holds the same."""
    training = Training(mode, seed=9)
    training.train(1, 1)
    of_model, of_optimizer = state_dicts.get_state_dict(training.model, training.optimizer)
    states: dict[str, Any] = {
        "model": of_model,
        "optimizer": of_optimizer,
        "lr_scheduler": training.scheduler.state_dict(),
        "step": 0,
    }
    dcp.load(states, checkpoint_id=f"{source}/checkpoint-2")
    state_dicts.set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )
    training.scheduler.load_state_dict(states["lr_scheduler"])
    assert states["step"] == 2
    require_same(training.state(), load_file(truth))
    assert training.rates() == RATES


def resume_from_torch(mode: str, out: str) -> None:
    """What stock ``dcp.save`` saved is gone on from; the run has it as its past."""
    training = Training(mode)
    training.train(1, 3)
    held = training.state()
    of_model, of_optimizer = state_dicts.get_state_dict(training.model, training.optimizer)
    states = {"model": of_model, "optimizer": of_optimizer, "step": 3}
    dcp.save(states, checkpoint_id=f"{out}/checkpoint-3")

    other = Training(mode, seed=9)
    assert ckpt.resume(model=other.model, optimizer=other.optimizer, run=out, verify="data") == 3
    require_same(other.state(), held)


def refuse(mode: str, source: str, out: str) -> None:
    """What is not as it was saved is said on every rank, and nothing is touched."""
    where: dict[str, Any] = {"run": source, "extra": {"sampler": Sampler(0)}}
    wide = Training(mode, seed=9, width=8)
    before = wide.state()
    lines = [_caught(lambda: ckpt.resume(**wide.parts, **where))]
    require_same(wide.state(), before)

    training = Training(mode)
    model, groups = training.model, training.optimizer.param_groups
    matrices, vectors = ({"params": group["params"]} for group in groups)
    others = (
        torch.optim.SGD([matrices, vectors], lr=0.1, momentum=0.9),
        torch.optim.AdamW([*matrices["params"], *vectors["params"]], lr=0.1),
    )
    for other in others:
        lines.append(_caught(lambda: ckpt.resume(model=model, optimizer=other, **where)))  # noqa: B023
    lines.append(_caught(lambda: ckpt.resume(model=model, optimizer=training.optimizer, **where)))
    lines.append(_caught(lambda: ckpt.resume(**training.parts, run=source)))
    lines.append(_caught(lambda: ckpt.Saver(**training.parts, run=out, weights="int8")))
    saver: Any = ckpt.Saver
    lines.append(_caught(lambda: saver(model=training.model)))
    lines.append(_caught(lambda: saver(run=out)))
    if not _rank():
        Path(out).mkdir(exist_ok=True)
        Path(out, "lines.json").write_text(json.dumps(lines))


def _caught(call: Any) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "no error"


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if any(job["mode"] != "alone" for job in jobs):
        dist.init_process_group("gloo")
    for job in jobs:
        globals()[job.pop("does")](**job)
    leave()


if __name__ == "__main__":
    main()
