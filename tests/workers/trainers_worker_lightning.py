"""One rank of a training with Lightning: ``trainers_worker_lightning.py OUT_DIR PART STAGES``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from ending import leave
from fixture_specs import tiny_llama
from kill_lightning import OnCpu, Strategy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

import ckpt
from ckpt import live
from ckpt.folders import locks
from ckpt.runs.pruning import pin
from ckpt.runs.run import open_checkpoint
from converters.errors import CheckpointError

EACH = {"every_n_train_steps": 1}
RANKS = int(os.environ["WORLD_SIZE"])


class Stock(OnCpu, DeepSpeedStrategy):
    """Lightning's own."""


class Small(LightningModule):
    """A tiny Llama with dropout, rows that only the step decides, a metric with a best."""

    epoch = 4  # steps of one

    def __init__(self) -> None:
        super().__init__()
        llama = tiny_llama(attention_dropout=0.3, tie_word_embeddings=True)
        llama.num_hidden_layers = 1
        self.model = hf.AutoModelForCausalLM.from_config(llama)
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        step = self.trainer.global_step + 1
        rows = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
        loss: torch.Tensor = self.model(input_ids=rows, labels=rows).loss
        self.losses.append(loss.item())
        self.log("score", float(abs(step - 4)))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(2 * self.epoch * RANKS, 1), batch_size=2)


class Pickled:
    """A state of the user's that cannot be pickled, in the middle of the engine's save."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no state today")


class Fails(Callback):
    """Brings such a state on rank 1 at the second save."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step > 1 and dist.get_rank() == 1:
            checkpoint["mine"] = Pickled(self.how)


class Live(Callback):
    """The engine's fp32 weights at the end, and the model's configuration."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        live.save_fp32(trainer.strategy.deepspeed_engine, folder / "live")
        if not dist.get_rank():
            module.model.config.save_pretrained(folder / "config")


class Holds(Callback):
    """Pins the checkpoint of step 1 and reads that of step 2 for as long as the training lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1 and dist.get_rank() == 0:
            pin(open_checkpoint(self.folder / "step=1.ckpt"), True)
        if trainer.global_step == 2 and dist.get_rank() == 0:
            self.lock = locks.reading(self.folder / "step=2.ckpt")


def fit(
    folder: Path,
    stage: int,
    epochs: int,
    callbacks: list[Any],
    kind: Any = Strategy,
    start: Any = None,
    precision: str = "bf16-true",
    **options: Any,
) -> Small:
    """Trains to the end of an epoch, from ``start`` on if given."""
    config = {
        "bf16": {"enabled": precision == "bf16-true"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 2,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        precision=precision,
        strategy=kind(config=config, **options),
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(7)
    module = Small()
    torch.manual_seed(100 + trainer.global_rank)
    trainer.fit(module, ckpt_path=start and str(start))
    return module


def steps(folder: Path, **options: Any) -> ModelCheckpoint:
    """Saves every two steps as FOLDER/step=N.ckpt."""
    named = {"filename": "{step}", "every_n_train_steps": 2, "enable_version_counter": False}
    return ModelCheckpoint(folder, **{"save_top_k": -1, **named, **options})


def refused(*args: Any, **options: Any) -> str:
    """The error that ends a training."""
    try:
        fit(*args, **options)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it went on")


def main() -> None:
    """Run the part."""
    warnings.simplefilter("ignore")
    part = globals()[sys.argv[2]]
    if part in (saves, turns, dies):  # which save after each step
        Small.epoch = 2
    part(Path(sys.argv[1]), *map(int, sys.argv[3:]))
    leave()


def saves(out: Path, *stages: int) -> None:
    """Each stage: with stock saves, with ours, and from both sorts of checkpoints on."""
    for stage in stages:
        folder = out / f"zero{stage}-w{RANKS}"
        alone = fit(folder, stage, 3, [steps(folder / "stock", **EACH)], Stock).losses
        ends = ModelCheckpoint(
            folder / "ends", "{epoch}", "score", save_last=True, enable_version_counter=False
        )
        assert fit(folder, stage, 3, [steps(folder / "out", **EACH), ends, Live()]).losses == alone
        starts = [("out/step=3", 3), ("out/step=4", 4), ("ends/epoch=1", 4)]
        for start, at in starts if stage == 2 else starts[:1]:
            losses = fit(folder, stage, 3, [], start=folder / f"{start}.ckpt").losses
            assert losses == alone[at:], (start, losses, alone[at:])
        theirs, ours = (
            fit(folder, stage, 3, [], Stock, folder / run / "step=3.ckpt").losses
            for run in ("stock", "out")
        )
        assert ours == theirs  # Lightning itself restores no random states
        assert fit(folder, stage, 3, [], start=folder / "stock" / "step=3.ckpt").losses == theirs


def turns(out: Path) -> None:
    """What goes wrong, what is kept, what is refused."""
    told = {}
    told["fails"] = refused(out, 3, 1, [steps(out / "fails", **EACH), Fails("raises")])
    link = {**EACH, "save_top_k": 1, "save_last": "link"}
    fit(out, 2, 1, [steps(out / "link", **link)])
    told["link"] = os.readlink(out / "link" / "last.ckpt")
    fit(out, 2, 2, [steps(out / "link", **{**link, "save_last": True})], start="last")
    fit(out, 2, 2, [steps(out / "kept", save_top_k=1, **EACH), Holds(out / "kept")])
    fit(out, 2, 1, [steps(out / "stock", **EACH)], Stock)
    fit(out, 2, 2, [steps(out / "out", **EACH)])
    run = out / "out"
    dist.barrier()
    if dist.get_rank() == 0:
        os.truncate(run / "step=4.ckpt/checkpoint/mp_rank_00_model_states.pt", 1000)
        shutil.copytree(out / "stock" / "step=1.ckpt", run / "foreign.ckpt")
    dist.barrier()
    told["torn"] = refused(out, 2, 3, [], start=run / "step=4.ckpt")
    fit(out, 2, 1, [], start=run / "foreign.ckpt")  # it proves that it is whole
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (run / "foreign.ckpt/checkpoint").glob("*rank_1*optim*"):
            path.unlink()
    dist.barrier()
    told["foreign"] = refused(out, 2, 3, [], start=run / "foreign.ckpt")
    different = run / f"step={1 + dist.get_rank()}.ckpt"
    told["different"] = refused(out, 2, 3, [], start=different)
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told))


class Begins(Callback):
    """Requires that a training begins with the fp32 weights of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.expected = {name: value.clone() for name, value in ckpt.open(checkpoint).items()}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        found = live.fp32_state_dict(trainer.strategy.deepspeed_engine, None)
        assert found is not None and found.keys() == self.expected.keys()
        for name, value in found.items():
            assert torch.equal(value, self.expected[name]), name


def leaves(out: Path) -> None:
    """A run of stage 2, to go on with on other ranks."""
    fit(out, 2, 1, [steps(out / "out")])


def goes_on(out: Path) -> None:
    """Resumes it on these ranks: said, resharded, and in another precision."""
    start = out / "out" / "step=4.ckpt"
    begins, options = [Begins(start)], {"start": start}
    told = refused(out, 3, 2, begins, **options)
    for stage in (3, 3, 2):
        module = fit(out, stage, 2, begins, reshard="auto", on_mismatch="warn", **options)
        assert len(module.losses) == 4
    fit(out, 2, 2, begins, reshard="auto", precision="32-true", on_mismatch="warn", **options)
    names = sorted(path.name for path in start.parent.glob("step=4*"))
    (out / "told.json").write_text(json.dumps([told, names]))


def dies(out: Path, stage: int) -> None:
    """Rank 1 is killed in the middle of the second save."""
    fit(out, stage, 1, [steps(out / "out", **EACH), Fails("dies")])


if __name__ == "__main__":
    main()
