"""A training without DeepSpeed
as what the front ends take an engine for: ``PlainEngine``.

It saves and loads nothing: whoever trains does. It is asked what a manifest says of a
training, what a resume compares, and how many bytes a save will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt.engine import first_step, optimizers
from ckpt.plain_torch import sharding

_FILE_BYTES = 4096  # of a file of torch.save or DCP beside its values
_TENSOR_BYTES = 1024  # of each tensor in one, beside its values


@dataclass(eq=False)
class PlainEngine:
    """One training; ``global_steps`` is set by whoever counts them.

    - ``optimizer``: torch's, or Accelerate's wrapper of it
    - ``sharding``: how the states are cut up; a checkpoint loads where it is the same
    - ``settings``: what DeepSpeed's configuration would say, under its names
    - ``writes``: whether this rank writes what is not cut up
    """

    module: Any
    optimizer: Any
    sharding: str = sharding.NONE
    settings: Mapping[str, Any] = field(default_factory=dict)
    global_steps: int = 0
    writes: bool = True

    def zero_optimization(self) -> bool:
        """Whether DeepSpeed cuts up the optimizer's state: never."""
        return False

    def zero_optimization_stage(self) -> int:
        """The stage of ZeRO: none."""
        return 0

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def is_cut_up(self) -> bool:
        """Whether each rank writes its part of the states."""
        return self.sharding != sharding.NONE and sharding.FULL not in self.sharding

    def state_bytes(self) -> int:
        """Bytes of the state files that this rank will write.

        Without FSDP the weights are no state: the model that lies beside is what a
        resume loads.
        """
        if not self.is_cut_up and not self.writes:
            return 0

        values = [*self._optimizer_values()]
        if self.sharding != sharding.NONE:
            values += self.module.parameters()
            values += self.module.buffers()

        count_bytes = sharding.local_bytes if self.is_cut_up else sharding.whole_bytes
        return count_bytes(values) + _TENSOR_BYTES * len(values) + 3 * _FILE_BYTES

    def _optimizer_values(self) -> Iterator[Any]:
        """The optimizer's tensors,
        before the first step those that it will keep after it."""
        inner_optimizer = optimizers.inner(self)
        with first_step.stepped(inner_optimizer) as future_values:
            states = inner_optimizer.state.values()
            values = [value for state in states for value in state.values()]
        present_ids = {id(value) for value in values}

        yield from values
        yield from (value for value in future_values if id(value) not in present_ids)
