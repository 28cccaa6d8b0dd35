"""Training with Lightning, without a GPU, for ``kill_fronts_ckpt`` and the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from kill_fronts import BATCH, EVERY, Task, Trained, config, digest, examples, model, rows_of
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ckpt.trainers.lightning import DeepSpeedStrategy


class OnCpu:
    """Before a DeepSpeed strategy, ours or Lightning's, among a class's bases: no CUDA needed."""

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _get_process_group_backend(self) -> str:
        return "gloo"

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class Strategy(OnCpu, DeepSpeedStrategy):
    """Ours."""


class Module(LightningModule):
    """The model of the other fronts; its optimizer is the one of DeepSpeed's configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def training_step(self, *_: Any) -> torch.Tensor:
        ids = rows_of(self.trainer.global_step + 1)  # a loader would begin again when it resumes
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> None:
        return None

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(examples(), batch_size=BATCH)  # type: ignore[arg-type]


class Watching(Callback):
    """Arms before the save, notes the first step, and takes the digest while there is an engine."""

    def __init__(self, task: Task):
        self.task, self.start, self.digest = task, 0, ""

    def on_train_start(self, trainer: Trainer, _: LightningModule) -> None:
        self.start = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.task.before_save(trainer.global_step)  # a ModelCheckpoint is called after the others

    def on_train_end(self, trainer: Trainer, _: LightningModule) -> None:
        self.digest = digest(trainer.strategy.deepspeed_engine)  # type: ignore[attr-defined]


def fit(task: Task, source: Path | None, patience: float) -> Trained:
    """Trains up to the task's last step, from a checkpoint on if one is given."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "sweep", "GROUP_RANK": "0"}
    watching = Watching(task)
    saving = ModelCheckpoint(task.out, filename="{step}", every_n_train_steps=EVERY, save_top_k=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        precision="bf16-true",
        strategy=Strategy(config=config(task.stage), absent_after=patience),
        plugins=[TorchElasticEnvironment()],
        default_root_dir=task.out,
        max_steps=task.last,
        callbacks=[watching, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    torch.manual_seed(int(os.environ["RANK"]))
    trainer.fit(module, ckpt_path=source)
    return Trained(watching.start, watching.digest)
