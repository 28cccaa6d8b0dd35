"""Checkpoints as trainers write them without ckpt, made of a few bytes or of fixtures.

Those in ``STOCK`` have the state files of a fixture; only their layout is made here, as accelerate
1.15 (``checkpointing.py``) and lightning 2.6 (``strategies/deepspeed.py``) write it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paths import FIXTURES
from run_folders import SOURCE
from safetensors.torch import save_file


def state(step: int, log: list[dict[str, Any]] | None = None) -> str:
    return json.dumps({"global_step": step, "epoch": 1.0, "log_history": log or []})


def trainers(folder: Path, step: int, ranks: int = 2, log: Any = None) -> Path:
    """As the Trainer saves under DDP, or alone."""
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for rank in range(ranks):
        name = f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"
        torch.save({"cpu": torch.get_rng_state()}, folder / name)
    (folder / "trainer_state.json").write_text(state(step, log))
    return folder


def dcp(folder: Path) -> None:
    """A folder of torch's distributed checkpoint."""
    import torch.distributed.checkpoint as distributed

    distributed.save({"w": torch.ones(3)}, checkpoint_id=folder, no_dist=True)


def sharded(folder: Path, step: int) -> Path:
    """As the Trainer saves with FSDP."""
    trainers(folder, step)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    dcp(folder / "pytorch_model_fsdp_0")
    dcp(folder / "optimizer_0")
    (folder / "trainer_state.json").touch()  # which is written last
    return folder


def accelerates(folder: Path, ranks: int = 2) -> Path:
    """As ``accelerator.save_state`` writes without DeepSpeed."""
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.bin")
    torch.save({"last_epoch": 1}, folder / "scheduler.bin")
    for rank in range(ranks):
        torch.save({"step": 1}, folder / f"random_states_{rank}.pkl")
    return folder


def lightnings(path: Path, step: int) -> Path:
    """As Lightning saves with any strategy but DeepSpeed's and FSDP's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"pytorch-lightning_version": "2.6.6", "global_step": step, "loops": {}}
    torch.save({**held, "state_dict": {"w": torch.ones(3)}, "optimizer_states": [{}]}, path)
    return path


def stock(run: Path, step: int, log: Any = None) -> Path:
    """As the Trainer saves with DeepSpeed, ZeRO-2 on two ranks."""
    folder = run / f"checkpoint-{step}"
    shutil.copytree(SOURCE, folder)
    scheduler = torch.load(folder / "scheduler.pt", weights_only=True)
    torch.save(scheduler | {"last_epoch": step}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(state(step, log))
    return folder


def with_model_of_another(folder: Path) -> Path:
    """As ``stock``, with the model file of another training: names and sizes are the same."""
    shutil.copytree(SOURCE, folder)
    change_weights(folder / "global_step2/mp_rank_00_model_states.pt")
    return folder


def change_weights(path: Path) -> None:
    """Gives the weights of a model file, or of a layer's, the values of another training."""
    content = torch.load(path, weights_only=False)
    for tensor in content.get("module", content).values():
        if tensor.is_floating_point():
            tensor.detach().add_(0.25)
    torch.save(content, path)


def of_trainer(folder: Path) -> Path:
    """Of the Hugging Face Trainer with DeepSpeed."""
    return Path(shutil.copytree(SOURCE, folder / "checkpoint-1"))


def of_engine(folder: Path) -> Path:
    """What ``engine.save_checkpoint(folder)`` leaves: the folder is run and checkpoint."""
    source = FIXTURES / "zero2-bf16-w2"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def of_accelerate(folder: Path) -> Path:
    """Of ``accelerator.save_state`` with DeepSpeed, on two ranks."""
    checkpoint = _tagged(folder / "checkpoint_1", "pytorch_model")
    for rank in range(2):
        torch.save({"step": 1}, checkpoint / f"random_states_{rank}.pkl")
    torch.save({"last_epoch": 1}, checkpoint / "scheduler.bin")
    return checkpoint


def of_lightning(folder: Path) -> Path:
    """Of Lightning's DeepSpeedStrategy."""
    return _tagged(folder / "epoch=0-step=2.ckpt", "checkpoint")


def _tagged(checkpoint: Path, tag: str) -> Path:
    shutil.copytree(SOURCE / "global_step2", checkpoint / tag)
    (checkpoint / "latest").write_text(tag)
    shutil.copy(SOURCE / "config.json", checkpoint)
    return checkpoint


STOCK: dict[str, Callable[[Path], Path]] = {
    "trainer": of_trainer,
    "engine": of_engine,
    "accelerate": of_accelerate,
    "lightning": of_lightning,
}
