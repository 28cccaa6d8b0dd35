"""One rank of a small training, as a user writes it: ``trial.py KIND FOLDER STEPS STAGE``.

Run by ``run_matrix.py`` on two ranks, first to step 2 and then, resumed, to step 4. Only what the
row's environment has is imported: the wheel of ckpt, and the versions that the row names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
VOCABULARY, LENGTH = 64, 8


def given_stage() -> int:
    """The ZeRO stage that the row trains."""
    return int(sys.argv[4]) if len(sys.argv) > 4 else 2


def zero_config(stage: int | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage or given_stage()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def llama(**more: Any) -> Any:
    """A tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            **more,
        )
    )


def rows() -> list[dict[str, list[int]]]:
    """Data of a few steps."""
    numbers = [[(7 * row + place) % VOCABULARY for place in range(LENGTH)] for row in range(64)]
    return [{"input_ids": each, "labels": each} for each in numbers]


def trainer(folder: Path, steps: int, model: Any, *, as_class: bool) -> None:
    """The Hugging Face Trainer, by the class or by the callback."""
    from transformers import Trainer, TrainingArguments

    import ckpt
    from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints

    class Committed(CommittedCheckpoints, Trainer):  # type: ignore[misc]
        retention = ckpt.Retention(last=2)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        deepspeed=zero_config(),
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    kind = Committed if as_class else Trainer
    callbacks = [] if as_class else [CheckpointCallback(retention=ckpt.Retention(last=2))]
    trained = kind(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)
    newest = ckpt.find(folder)
    require_start(newest, steps)
    trained.train(resume_from_checkpoint=None if newest is None else str(newest))
    assert trained.state.global_step == steps


def adapter(folder: Path, steps: int) -> None:
    """A LoRA training of a base model that lies beside the run."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = folder.with_name("base")
    if os.environ["RANK"] == "0" and not base.exists():
        torch.manual_seed(0)
        llama(attention_bias=True).save_pretrained(base)
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(base)
    # Without trained biases one of the Trainer's two param groups is empty. DeepSpeed removes it,
    # and with transformers before 5 and torch 2.13 the scheduler fails then, without ckpt too.
    settings = LoraConfig(
        target_modules=["q_proj", "v_proj"],
        r=4,
        bias="all",
        init_lora_weights=False,  # by default a half of them is zeros, whatever was loaded
    )
    trainer(folder, steps, get_peft_model(model, settings), as_class=True)


def accelerate(folder: Path, steps: int) -> None:
    """A loop with Accelerate."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    import ckpt
    from ckpt.trainers.accelerate import load_state, save_state

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=True, backend="gloo")  # or each rank takes itself for the only one
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_config()))
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.utils.data.DataLoader(
        [torch.tensor(row["input_ids"]) for row in rows()], batch_size=2
    )
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    start = load_state(accelerator, folder)
    require_start(start or None, steps)
    for step, batch in zip(range(start + 1, steps + 1), batches, strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            saved = save_state(accelerator, folder, retention=ckpt.Retention(last=2))
            assert {f"random_states_{rank}.pkl" for rank in (0, 1)} <= set(os.listdir(saved))


def saver(folder: Path, steps: int) -> None:
    """A loop with DeepSpeed alone, always under ZeRO-3."""
    import deepspeed
    import torch

    import ckpt

    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config(3))
    start = ckpt.resume(engine, folder)
    require_start(start or None, steps)
    with ckpt.Saver(engine, folder, every=2, retention=ckpt.Retention(last=2)) as saving:
        for step in range(start + 1, steps + 1):
            loss = engine(torch.ones(2, 8).bfloat16()).square().mean()
            engine.backward(loss)
            engine.step()
            saving.step(step, metrics={"loss": loss.item()})


def lightning(folder: Path, steps: int) -> None:
    """A fit with Lightning."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    import ckpt
    from ckpt.trainers.lightning import DeepSpeedStrategy

    class OnCpu(DeepSpeedStrategy):  # type: ignore[misc,valid-type]
        """The strategy without a GPU, which Lightning's insists on."""

        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _get_process_group_backend(self) -> str:
            return "gloo"

    class Small(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                [torch.tensor(row["input_ids"]) for row in rows()], batch_size=2
            )

    newest = ckpt.find(folder)
    require_start(newest, steps)
    fit = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=2,
        strategy=OnCpu(stage=given_stage()),
        precision="bf16-mixed",
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
    )
    fit.fit(Small(), ckpt_path=None if newest is None else str(newest))
    assert fit.global_step == steps


def require_start(newest: Any, steps: int) -> None:
    """Fails unless the second part goes on from the first."""
    assert (newest is None) == (steps == 2), f"to step {steps} from {newest}"


TRIALS = {
    "class": lambda folder, steps: trainer(folder, steps, llama(), as_class=True),
    "callback": lambda folder, steps: trainer(folder, steps, llama(), as_class=False),
    "PEFT": adapter,
    "Accelerate": accelerate,
    "Saver": saver,
    "Lightning": lightning,
}


if __name__ == "__main__":
    TRIALS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
