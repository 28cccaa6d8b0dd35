"""The known facts of a training before it has an engine: its ranks,
and DeepSpeed's configuration.

The Hugging Face Trainer and Accelerate keep the configuration where it can be asked for
(transformers 5.23 ``integrations/deepspeed.py: deepspeed_config``, from the time its
arguments are made; Accelerate 1.15 ``state.py: AcceleratorState``). Neither is imported
here: where it is not loaded, there is nothing to ask.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.layout import Layout
from ckpt.resuming import topology
from ckpt.resuming.resume_point import ResumePoint
from ckpt.resuming.topology import Reshard
from ckpt.runs.ancestry import Partitioning
from ckpt.runs.run import open_checkpoint
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def config() -> Mapping[str, Any] | None:
    """DeepSpeed's configuration of this process; ``None`` where nobody has said one."""
    transformers = sys.modules.get("transformers.integrations.deepspeed")
    if transformers is not None:
        configuration = transformers.deepspeed_config()
        if configuration is not None:
            return dict(configuration)

    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.AcceleratorState._shared_state:
        return None
    plugin = accelerate.AcceleratorState().deepspeed_plugin
    return None if plugin is None else dict(plugin.deepspeed_config)


def layout(ranks: RankGroup | None) -> Layout | None:
    """How this training will cut up its state; ``None`` where that is not known."""
    configuration = config()
    if ranks is None or configuration is None:
        return None
    return Layout.of_config(configuration, ranks.world)


def fits(ranks: RankGroup | None) -> Callable[[Partitioning], bool] | None:
    """Whether a checkpoint loads here, as far as that is known; ``None`` if nothing is."""
    current_layout = layout(ranks)
    if current_layout is not None:
        return current_layout.topology.fits
    if ranks is None:
        return None

    world = ranks.world

    def has_as_many_ranks(partitioning: Partitioning) -> bool:
        return not partitioning.stage or partitioning.world_size == world

    return has_as_many_ranks


def offer(ranks: RankGroup | None, folder: Path, mode: Reshard) -> Path:
    """The checkpoint that was found or, with ``reshard="auto"``, what loads here; every
    rank calls it. Without, one that does not load is named on stderr, with the
    command."""
    topology.require_known(mode)
    current_layout = layout(ranks)
    if ranks is None or current_layout is None:
        if mode is not None:
            raise CheckpointError(
                'reshard="auto": the ranks and the ZeRO stage of this training are '
                "not known yet; call ckpt.find when the Trainer's arguments or the "
                "Accelerator are made, or pass it to what loads",
                "refused",
            )

        return folder

    if mode is not None:
        return topology.loadable(ranks, folder, current_layout, mode)

    with ranks.step():
        checkpoint = open_checkpoint(folder)
        source = None
        if checkpoint.manifest is not None and not ranks.rank:
            source = ResumePoint.of(checkpoint)

        if source is not None and not source.topology.loads_as(current_layout.topology):
            reason = topology.refusal(
                source, current_layout, f"{topology.BY_ARGUMENT} to ckpt.find"
            )
            log.warning("%s", reason)

    return folder
