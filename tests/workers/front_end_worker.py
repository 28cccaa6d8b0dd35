"""One rank of a front end that is written by the guide: ``... GUIDE OUT_DIR``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from live_worker import start, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import Spec

from ckpt.distributed.ranks import RankGroup
from ckpt.plain_torch.engine import PlainEngine
from ckpt.saving.commit import identity


class EngineTraining:
    """A training whose engine saves and loads."""

    def __init__(self) -> None:
        self.engine = start(Spec(2))

    def steps(self, count: int) -> list[float]:
        """Trains, and returns the losses."""
        return train(self.engine, count)

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        self.engine.load_checkpoint(str(folder), tag=tag)


class PlainTraining:
    """A training without DeepSpeed, whose rank 0 saves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.parallel_model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.engine = PlainEngine(self.model, self.optimizer, writes=dist.get_rank() == 0)
        torch.manual_seed(100 + dist.get_rank())

    def steps(self, count: int) -> list[float]:
        """Trains, and returns the losses."""
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.parallel_model(torch.randn(4, 6)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.engine.global_steps += 1
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, tag: None) -> None:
        if dist.get_rank() == 0:
            torch.save(self.model.state_dict(), folder / "pytorch_model.bin")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.bin")

    def load(self, folder: Path, tag: None) -> None:
        self.model.load_state_dict(torch.load(folder / "pytorch_model.bin"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.bin"))


class Sampler:
    """An object of the user."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def guide_module(path: str) -> ModuleType:
    """The blocks of the guide as a module."""
    spec = importlib.util.spec_from_file_location("guide", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scene(guide: ModuleType, form: Any, resume: Any, run: Path) -> None:
    """Saves, trains on, and trains the same again from what was saved, as another process.

    That one saves into another folder, where nothing says what it goes on from.
    """
    ranks, sampler = RankGroup("save", 60.0), Sampler()
    training, run_folder = form(), guide.run_folder_of(run, ranks)
    assert resume(training, training.engine, run, {"sampler": sampler}) == 0
    training.steps(2)
    sampler.position = 7
    guide.save(training, training.engine, run_folder, 2, {"sampler": sampler})
    losses = training.steps(2)
    run_folder.release()

    identity._launches.clear()
    training, sampler = form(), Sampler()
    assert resume(training, training.engine, run, {"sampler": sampler}) == 2
    assert sampler.position == 7
    assert training.steps(2) == losses
    run_folder = guide.run_folder_of(f"{run}-on", ranks)
    guide.save(training, training.engine, run_folder, 4, {"sampler": sampler})
    run_folder.release()


def foreign_scene(guide: ModuleType, run: Path) -> None:
    """What DeepSpeed alone saved is one of the run that goes on from it."""
    training = EngineTraining()
    training.steps(1)
    training.engine.save_checkpoint(str(run / "checkpoint-1"))
    dist.barrier()

    training = EngineTraining()
    assert guide.resume(training, training.engine, run) == 1


def main(guide_path: str, out: str) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    guide = guide_module(guide_path)
    scene(guide, EngineTraining, guide.resume, Path(out, "deepspeed"))
    foreign_scene(guide, Path(out, "foreign"))
    scene(guide, PlainTraining, guide.resume_plain, Path(out, "plain"))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
