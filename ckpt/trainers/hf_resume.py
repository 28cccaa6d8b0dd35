"""A Hugging Face training that goes on: from the newest whole checkpoint, and as the same run.

    trainer = Trainer(..., callbacks=[ckpt.trainers.hf.ResumeCallback()])
    trainer.train(resume_from_checkpoint=ckpt.find("out"))

The Trainer loads what it is given, by DeepSpeed's ``load_checkpoint``, and takes random states that
are missing for none (transformers 5.23 ``trainer.py: _load_rng_state``). The callback refuses what
does not load on these ranks (``hf_watch.Watch``), and looks at what came of it before the first
step, on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedOptimizerWrapper
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs.completeness import has_tag
from ckpt.runs.run import Checkpoint, Run
from ckpt.saving import choosing, configured, continuity, optimizers, precision, rng
from ckpt.saving.asked import Asked, committed
from ckpt.saving.changes import Request, Ways, names_in
from ckpt.saving.choosing import Thorough
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.layout import Layout
from ckpt.saving.progress import progress
from ckpt.saving.source import Source
from ckpt.trainers.hf_state import Shown, deepspeed_config, loop_of
from ckpt.trainers.hf_watch import Watch
from converters.errors import CheckpointError

WAYS = Ways(
    'pass on_mismatch="warn" to ResumeCallback',
    "put CommittedCheckpoints among the Trainer's bases, with load_optimizer_states = False",
    None,
)


class ResumeCallback(TrainerCallback):
    """Stops a training that goes on differently than it was saved, before its first step.

    - ``checkpoint``: what is resumed from; without, that of the step in ``output_dir``
    - ``verify``: "structure" looks at sizes and headers, "data" reads every byte
    - ``on_mismatch``: "error" stops on every rank; "warn" only says what differs
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as the
      Trainer's arguments have them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_foreign``: whether to go on from one without a manifest
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    It stays out of trainings that begin. Of those without DeepSpeed it only stops one that goes on
    from a checkpoint of DeepSpeed, of which the Trainer would load the weights alone. A Trainer
    with ``CommittedCheckpoints`` takes these options and compares before it loads.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        verify: Thorough = "structure",
        on_mismatch: OnMismatch = "error",
        override: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        load_foreign: bool = False,
        timeout: float = TIMEOUT,
    ):
        continuity.require_known(on_mismatch)
        self.checkpoint, self.verify, self.on_mismatch = checkpoint, verify, on_mismatch
        self.override, self.renamed = override, dict(renamed or {})
        self.load_foreign, self.timeout = load_foreign, timeout
        self.watch = Watch(timeout)
        self.comparison: Comparison | None = None  # of a Trainer that compares before it loads
        self.anew: tuple[str, ...] = ()  # what begins anew in it

    def on_train_begin(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """Compares what was saved with what there is."""
        wrapper = seen.get("optimizer")
        if not state.global_step:
            return
        if not isinstance(wrapper, DeepSpeedOptimizerWrapper):
            _require_loaded(Path(self.checkpoint or args.output_dir), int(state.global_step))
            return
        ranks = Ranks("ResumeCallback", self.timeout)
        path = Path(self.checkpoint or args.output_dir)
        tag = str(state.global_step) if self.checkpoint is None else None
        asked = Asked(
            ranks, path, tag, None, self.verify, self.on_mismatch, self.load_foreign, ways=WAYS
        )
        asked.require_same([state.global_step])
        layout = Layout.of_config(deepspeed_config(), ranks.world)
        options = (self.verify, self.load_foreign, configured.fits(ranks))
        found = choosing.choose(ranks, path, tag, *options)
        if found is not None:
            found = committed(ranks, found)
        with ranks.step() as step:
            if found is None:
                raise CheckpointError(f"{path} holds no checkpoint to compare with", "incomplete")
            source = Source.of(_loaded(found, layout) if layout else found)
            config, at = deepspeed_config(), int(state.global_step)
            stage = int(config.get("zero_optimization", {}).get("stage", 0))
            shown = Shown(seen["model"], wrapper.optimizer, stage, ranks.rank, at, config)
            comparison = self._compared(source, shown, args, seen)
            now = {**progress(shown, state.epoch), "step": at}
            comparison.noted["step"] = source.step
            without = ["global_steps", *self.anew]  # steps: that is all it knows
            saved = precision.of_checkpoint(source.folder / source.tag)
            if saved not in (None, precision.of_config(config)):
                without.append("loss_scale")
            rows = comparison.rows(now, without)
            step.value = continuity.mismatches(rows) + _lost(source.folder, args)
        if self.comparison is None and not ranks.rank:
            comparison.say()
        self.comparison = None
        asked.tell(source, rows, step.heard)

    def _compared(self, source: Source, shown: Shown, args: Any, seen: Any) -> Comparison:
        """What a Trainer has compared already; of any other, now that all is loaded."""
        if self.comparison is not None:
            return self.comparison
        request = Request(names_in(self.override), self.renamed, ways=WAYS)
        loop = loop_of(args, seen.get("lr_scheduler"), seen.get("train_dataloader"))
        asked = options_of(args, optimizers.inner(shown))
        comparison = Comparison(source, shown, request, loop=loop, asked=asked)
        comparison.require_here(self.on_mismatch)
        comparison.apply()
        return comparison


def options_of(args: Any, optimizer: Any) -> Sequence[Mapping[str, Any]]:
    """The options of each param group as the script gave them, when others are loaded already.

    The optimizer knows what it was made with. Only weight decay is given by groups: the Trainer
    makes one of all weights, and one of norms and biases without decay (transformers 5.23
    ``trainer.py: get_decay_parameter_names``).
    """
    defaults = optimizer.defaults
    groups = optimizer.param_groups
    found = []
    for index, group in enumerate(groups):
        options = {name: defaults.get(name, value) for name, value in group.items()}
        options[optimizers.LR] = defaults.get(optimizers.LR, group[optimizers.LR])
        if optimizers.BASE in group:
            options[optimizers.BASE] = options[optimizers.LR]
        if "weight_decay" in group and options[optimizers.LR] == args.learning_rate:
            decays = index == 0 or index < len(groups) - 1
            options["weight_decay"] = args.weight_decay if decays else 0.0
        elif "weight_decay" in group and len(groups) > 1:
            options["weight_decay"] = group["weight_decay"]
        del options["params"]
        found.append(options)
    return found


def _loaded(found: Checkpoint, layout: Layout) -> Checkpoint:
    """What the Trainer went on from: ``found`` or, if that does not load here, its resharding."""
    held = found.manifest
    if held is None or layout.topology.fits(held):
        return found
    for other in Run(found.folder.parent).checkpoints():
        made = other.committed and other.step == found.step and other.name.startswith(found.name)
        if made and other.manifest is not None and layout.topology.fits(other.manifest):
            return other
    return found


def _require_loaded(path: Path, step: int) -> None:
    """``CheckpointError`` if a Trainer without DeepSpeed goes on from a checkpoint of DeepSpeed.

    It takes the weights that lie in it, and begins with a new optimizer, without a word.
    """
    folder = (
        path
        if (path / TRAINER_STATE_NAME).exists() and path.name.endswith(f"-{step}")
        else (path / f"{PREFIX_CHECKPOINT_DIR}-{step}")
    )
    if folder.is_dir() and has_tag(folder) and not (folder / "optimizer.pt").exists():
        raise CheckpointError(
            f"{folder} was saved with DeepSpeed, this training has none: its optimizer and random "
            "states are not loaded; give it DeepSpeed again, or name another checkpoint",
            "unsupported",
        )


def _lost(folder: Path, args: Any) -> list[str]:
    """Whether the Trainer finds this rank's random states; it looks for them later."""
    name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    if (folder / name).exists():
        return []
    ours = (folder / rng.NAME.format(args.process_index)).exists()
    more = ", which is not what the Trainer reads" if ours else ""
    return [f"{name} is not there{more}: random states are not as they were saved"]
