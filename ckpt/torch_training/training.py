"""Model, optimizer and scheduler of a plain torch training,
seen as front ends see an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from converters.errors import CheckpointError
from converters.words import with_article

# What checkpoint_wrapper and torch.compile put into names of inner modules.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class TorchTraining:
    """A training as front ends see an engine; ``global_steps`` is what it was told last.

    ``module`` is the model without DDP and torch.compile around it, the same object
    however it was given. ``CheckpointError`` for what is not a model, an optimizer or a
    scheduler, and for FSDP1.
    """

    # Pieces of tensors with names: they load into any other sharding.
    sharding = "DCP"

    def __init__(self, model: nn.Module, optimizer: Any = None, scheduler: Any = None):
        _require(model, nn.Module, "model", "a torch.nn.Module")
        if optimizer is not None:
            _require(optimizer, torch.optim.Optimizer, "optimizer", "one torch.optim.Optimizer")
        for name in ("state_dict", "load_state_dict"):
            if scheduler is not None and not callable(getattr(scheduler, name, None)):
                raise CheckpointError(
                    f"scheduler is {with_article(type(scheduler).__name__)} without {name}(); give "
                    "a scheduler of torch.optim.lr_scheduler, or an object with both",
                    "output",
                )

        self.module: Any = _unwrapped(model)
        _require_known_wrappers(self.module)
        self.optimizer, self.lr_scheduler = optimizer, scheduler
        self.settings: Mapping[str, Any] = {}
        self.global_steps = 0

    def zero_optimization(self) -> bool:
        """Whether it is DeepSpeed that partitions the state."""
        return False

    def zero_optimization_stage(self) -> int:
        """The stage of ZeRO: none."""
        return 0

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        return [group.get("lr") for group in groups]

    def name_of(self, name: str) -> str:
        """The name of a parameter without what wrappers of inner modules put into it."""
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    def trained_names(self) -> dict[int, str]:
        """The name of each parameter by its id; of a tied one the first."""
        return {id(value): self.name_of(name) for name, value in self.module.named_parameters()}


def _require(value: object, kind: type, name: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{name} is {with_article(type(value).__name__)}, expected {expected}", "output"
        )


def _unwrapped(model: Any) -> Any:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod
        else:
            return model


def _require_known_wrappers(module: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise CheckpointError(
            "the model is wrapped with FullyShardedDataParallel (FSDP1), whose states ckpt.Saver "
            "does not save; use fully_shard (FSDP2), DDP, or the Trainer or Accelerate with FSDP",
            "unsupported",
        )
