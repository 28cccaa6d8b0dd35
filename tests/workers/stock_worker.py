"""Trainings without ckpt and without DeepSpeed, which then ask ``ckpt.find`` where to go on.

Started by ``test_foreign.py``: ``stock_worker.py OUT_DIR PART``, one function each.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from ending import leave

import ckpt
from converters.errors import CheckpointError


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((4,), index / 32), "labels": torch.tensor([1.0])}


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: Any, labels: Any = None) -> Any:
        found = self.layer(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


def trainer(out: Path) -> None:
    """The Trainer alone: find gives what it saved, passes over a torn one, and it goes on."""
    import transformers as hf

    def train(steps: int, resume: str | None = None, **more: Any) -> Any:
        options: dict[str, Any] = {"save_steps": 2, "logging_steps": 1, "report_to": "none"}
        options |= {"use_cpu": True, "disable_tqdm": True, "max_steps": steps, **more}
        args = hf.TrainingArguments(output_dir=str(out / "run"), **options)
        from ckpt.trainers.hf import CommittedCheckpoints, ResumeCallback

        kind = type("Mine", (CommittedCheckpoints, hf.Trainer), {})
        torch.manual_seed(0)
        made = kind(Linear(), args, train_dataset=Rows(), callbacks=[ResumeCallback()])
        made.train(resume_from_checkpoint=resume)
        return made

    assert ckpt.find(out / "run") is None
    train(4)
    assert ckpt.find(out / "run") == str(out / "run/checkpoint-4")
    os.truncate(out / "run/checkpoint-4/optimizer.pt", 900)
    found = ckpt.find(out / "run", verify="data")
    assert found == str(out / "run/checkpoint-2"), found
    made = train(6, found)
    made.save_model()
    made.save_state()
    assert ckpt.find(out / "run") == str(out / "run/checkpoint-6")
    shutil.rmtree(out / "run")
    train(4, save_only_model=True)
    assert ckpt.find(out / "run") is None


def loops(out: Path) -> None:
    """Accelerate's ``save_state``, named by it and by the loop."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    named = ProjectConfiguration(str(out / "auto"), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=named)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        accelerator.save_state()
    assert ckpt.find(out / "auto/checkpoints") == str(out / "auto/checkpoints/checkpoint_2")
    try:
        ckpt.find(out / "auto")
    except CheckpointError as error:
        assert "auto/checkpoints does: name that folder" in str(error)
    else:
        raise AssertionError("a fresh start")
    named.automatic_checkpoint_naming = False
    for step in (20, 100):
        accelerator.save_state(str(out / "own" / f"step_{step}"))
    assert ckpt.find(out / "own") == str(out / "own/step_100")
    for epoch in (9, 10):
        accelerator.save_state(str(out / "epochs" / f"epoch_{epoch}"))
    assert ckpt.find(out / "epochs") == str(out / "epochs/epoch_10")


def lightning(out: Path) -> None:
    """Lightning on one process: a zip for each checkpoint."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Linear()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    def fit(steps: int, path: str | None = None) -> int:
        saves = ModelCheckpoint(str(out / "run"), every_n_train_steps=2, save_top_k=-1)
        options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        made = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, callbacks=[saves], **options
        )
        made.fit(Module(), torch.utils.data.DataLoader(Rows(), 2), ckpt_path=path)
        return made.global_step

    fit(4)
    found = ckpt.find(out / "run")
    assert found is not None and found.endswith("step=4.ckpt"), found
    assert fit(6, found) == 6
    newest = next((out / "run").glob("*step=6.ckpt"))
    os.truncate(newest, newest.stat().st_size - 10)
    assert ckpt.find(out / "run") == found


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]))
    leave()
