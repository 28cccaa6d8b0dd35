"""A training whose saves are measured before the first one."""

from __future__ import annotations

import torch.distributed as dist

from ckpt.engine import first_step
from ckpt.torch_training import capture, leaves
from ckpt.torch_training.training import TorchTraining


class MeasuredTraining(TorchTraining):
    """A ``PlainView``: it says how large a save will be."""

    def state_bytes(self) -> int:
        """Bytes of the state files that this rank will write,
        with what the optimizer will keep."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        state_leaves = leaves.of_training(self, 0)
        nbytes = capture.part_of(state_leaves, rank, world).file.nbytes
        if self.optimizer is None or any(self.optimizer.state.values()):
            return nbytes

        trained = [
            leaf for leaf in leaves.of_model(self) if leaf.is_tensor and leaf.value.requires_grad
        ]
        trained_bytes = capture.part_of(trained, rank, world).file.nbytes
        return nbytes + int(trained_bytes * (first_step.growth(self.optimizer) - 1))
