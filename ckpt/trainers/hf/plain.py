"""Trainings of the Hugging Face Trainer without DeepSpeed: FSDP, DDP, and one process.

They save and commit as those with DeepSpeed do. What DeepSpeed's engine is asked there,
a ``PlainEngine`` answers here. Source: transformers 5.23
``trainer.py: _prepare_for_training`` (``self.model`` is what FSDP wraps, and the bare
model under DDP), ``training_args.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt.live.export import save_config
from ckpt.plain_torch import accelerated, sharding
from ckpt.plain_torch.engine import PlainEngine
from ckpt.saving import adapter
from converters.errors import CheckpointError
from converters.options import DTYPE


def uses_deepspeed(optimizer: Any) -> bool:
    """Whether the optimizer that a Trainer shows is DeepSpeed's.

    By name: without DeepSpeed Accelerate has no such class.
    """
    return any(kind.__name__ == "DeepSpeedOptimizerWrapper" for kind in type(optimizer).__mro__)


def engine_of(args: Any, model: Any, optimizer: Any) -> PlainEngine:
    """The training of a model and an optimizer that the Trainer has prepared."""
    return accelerated.engine_of(model, optimizer, _settings_of(args), bool(args.should_save))


def _settings_of(args: Any) -> dict[str, Any]:
    """What the Trainer's arguments say, under the names of DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": int(args.train_batch_size),
        "gradient_accumulation_steps": int(args.gradient_accumulation_steps),
        "gradient_clipping": float(args.max_grad_norm or 0),
    }


def writes_model(engine: PlainEngine) -> bool:
    """Whether the Trainer writes a loadable model beside the states."""
    return not engine.is_cut_up


def write_companions(engine: PlainEngine, processing: Any, folder: Path) -> None:
    """The configuration and the tokenizer,
    where FSDP saves parts and the Trainer neither.

    So what is converted from the checkpoint is a model that loads.
    """
    module = sharding.unwrapped(engine.module)
    if hasattr(module, "peft_config"):
        adapter.save_config(module, folder)
    else:
        save_config(module, folder, None)
    if processing is not None:
        processing.save_pretrained(folder)


def require_supported(engine: PlainEngine, args: Any, weights: str | None) -> None:
    """``CheckpointError`` for options that a training without DeepSpeed cannot have."""
    if engine.is_cut_up and weights is not None:
        raise CheckpointError(
            f"weights = {weights!r}: ckpt writes a model from the parts of DeepSpeed's engine, and "
            f"this training has {engine.sharding}; unset it, and make a model of a checkpoint by "
            f"ckpt to-fp32 CHECKPOINT {DTYPE(weights)}, or set FSDP's state_dict_type to "
            f"{sharding.FULL}",
            "unsupported",
        )
    if engine.is_cut_up and args.save_only_model:
        raise CheckpointError(
            f"save_only_model: with {engine.sharding} the Trainer writes no model, so that nothing "
            f"would be saved; unset it, or set FSDP's state_dict_type to {sharding.FULL}",
            "unsupported",
        )
    if engine.is_cut_up and args.save_on_each_node:
        raise CheckpointError(
            f"save_on_each_node: the parts that {engine.sharding} saves load from one folder that "
            "all nodes share; unset it, and name such a folder",
            "unsupported",
        )
