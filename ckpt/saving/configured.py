"""What is known of a training before it has an engine: its ranks, and DeepSpeed's configuration.

The Hugging Face Trainer and Accelerate keep the configuration where it can be asked for
(transformers 5.23 ``integrations/deepspeed.py: deepspeed_config``, from the time its arguments are
made; Accelerate 1.15 ``state.py: AcceleratorState``). Neither is imported here: where it is not
loaded, there is nothing to ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import open_checkpoint
from ckpt.saving import topology
from ckpt.saving.layout import Layout
from ckpt.saving.source import Source
from ckpt.saving.topology import Reshard
from converters.errors import CheckpointError


def config() -> Mapping[str, Any] | None:
    """DeepSpeed's configuration of this process; ``None`` where nobody has said one."""
    transformers = sys.modules.get("transformers.integrations.deepspeed")
    if transformers is not None and (found := transformers.deepspeed_config()) is not None:
        return dict(found)
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.AcceleratorState._shared_state:
        return None
    plugin = accelerate.AcceleratorState().deepspeed_plugin
    return None if plugin is None else dict(plugin.deepspeed_config)


def layout(ranks: Ranks | None) -> Layout | None:
    """How this training will cut up its state; ``None`` where that is not known."""
    found = config()
    if ranks is None or found is None:
        return None
    return Layout.of_config(found, ranks.world)


def fits(ranks: Ranks | None) -> Callable[[Manifest], bool] | None:
    """Whether a checkpoint loads here, as far as that is known; ``None`` if nothing is."""
    known = layout(ranks)
    if known is not None:
        return known.topology.fits
    if ranks is None:
        return None
    world = ranks.world

    def as_many(held: Manifest) -> bool:
        return not held.stage or held.world_size == world

    return as_many


def offer(ranks: Ranks | None, folder: Path, mode: Reshard) -> Path:
    """The checkpoint that was found or, with ``reshard="auto"``, what loads here; every rank calls
    it. Without, one that does not load is named on stderr, with the command."""
    topology.require_known(mode)
    known = layout(ranks)
    if ranks is None or known is None:
        if mode is not None:
            raise CheckpointError(
                'reshard="auto": the ranks and the ZeRO stage of this training are not known yet; '
                "call ckpt.find when the Trainer's arguments or the Accelerator are made, or pass "
                "it to what loads",
                "refused",
            )
        return folder
    if mode is not None:
        return topology.loadable(ranks, folder, known, mode)
    with ranks.step():
        found = open_checkpoint(folder)
        source = Source.of(found) if found.manifest is not None and not ranks.rank else None
        if source is not None and not source.topology.loads_as(known.topology):
            why = topology.refusal(source, known, f"{topology.BY_ARGUMENT} to ckpt.find")
            print(f"ckpt: {why}", file=sys.stderr, flush=True)
    return folder
