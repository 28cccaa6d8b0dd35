"""One ``engine.load_checkpoint`` that brings back all of a checkpoint, or its weights alone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ckpt.saving import reading
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import Row
from ckpt.saving.progress import progress
from ckpt.saving.source import Source
from ckpt.saving.turns import Turn
from converters.errors import CheckpointError

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# What DeepSpeed itself puts beside the user's client state (runtime/engine.py:
# _common_checkpoint_state, _save_checkpoint, _checkpoint_parallel_metadata).
DEEPSPEEDS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
    *(
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "checkpoint_parallel_dimensions",
    ),
    *("num_experts", "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info"),
}


class Load:
    """One ``engine.load_checkpoint``, and what there is to compare after it."""

    def __init__(
        self, engine: Any, source: Source, turn: Turn, comparison: Comparison, alone: bool
    ):
        """``alone``: the module's weights and nothing else."""
        self.engine, self.source, self.turn, self.module_only = engine, source, turn, alone
        self.comparison = comparison
        self.config: Any = None  # DeepSpeed's, as it was saved
        self.epoch: Any = None  # the loop's own
        self.same_precision = True  # saved in the precision that it was loaded in

    def __call__(self, strict: bool) -> dict[str, Any]:
        """Loads; returns the client state. ``CheckpointError`` if DeepSpeed loads nothing."""
        engine, source, request = self.engine, self.source, self.comparison.request
        before = {name: getattr(engine, name) for name in COUNTERS if hasattr(engine, name)}
        drop = ("random_ltd", "data_sampler") if self.module_only else ()
        with ExitStack() as stack:
            reader = stack.enter_context(reading.mapped(engine, drop, self.turn, request.renamed))
            if not request.optimizer_states:
                stack.enter_context(reading.weights_alone(engine))
            path, client = engine.load_checkpoint(
                str(source.folder),
                tag=source.tag,
                load_module_strict=strict,
                load_lr_scheduler_states=request.scheduler_states,
            )
            if path is None:
                raise CheckpointError(
                    f"{source.folder}: DeepSpeed loaded nothing of tag {source.tag}", "incomplete"
                )
            self.config = reader.config
            self.same_precision = reader.change is None
            mine = {name: value for name, value in client.items() if name not in DEEPSPEEDS}
            reader.detach(mine)
            client.clear()
            self.epoch = mine.get("epoch")
        if self.module_only:
            for name, value in before.items():
                setattr(engine, name, value)
            return {}
        self.comparison.apply()
        return mine

    def rows(self) -> list[Row]:
        """What was noted at the save, and how it is now."""
        if self.module_only:
            return []
        now = progress(self.engine, self.epoch)
        without = () if self.same_precision else ("loss_scale",)
        return self.comparison.rows(now, without, self.config)
