"""A Hugging Face training that goes on:
from the newest whole checkpoint, and as the same run.

    trainer = Trainer(..., callbacks=[ckpt.trainers.hf.ResumeCallback()])
    trainer.train(resume_from_checkpoint=ckpt.find("out"))

The Trainer loads what it is given, by DeepSpeed's ``load_checkpoint``, and takes random
states that are missing for none (transformers 5.23 ``trainer.py: _load_rng_state``). The
callback refuses what does not load on these ranks (``load_watch.Watch``), and looks at
what came of it before the first step, on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ckpt.distributed.ranks import TIMEOUT, RankGroup
from ckpt.engine import optimizers, precision
from ckpt.engine.layout import Layout
from ckpt.engine.progress import progress
from ckpt.resuming import configured, continuity, plain, select
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.request import ResumeRequest, committed
from ckpt.resuming.resume_point import ResumePoint
from ckpt.resuming.select import VerifyLevel
from ckpt.runs.run import Run, RunCheckpoint, open_checkpoint, original_of
from ckpt.state import rng
from ckpt.trainers.hf.load_watch import WAYS, LoadWatch
from ckpt.trainers.hf.plain import engine_of, uses_deepspeed
from ckpt.trainers.hf.plain_resume import PlainResume
from ckpt.trainers.hf.trainer_state import CallbackEngine, deepspeed_config, loop_of
from converters.errors import CheckpointError


class ResumeCallback(TrainerCallback):
    """Stops a training that goes on differently than it was saved,
    before its first step.

    - ``checkpoint``: what is resumed from; without, that of the step in ``output_dir``
    - ``verify``: "structure" looks at sizes and headers, "data" reads every byte
    - ``on_mismatch``: "error" stops on every rank; "warn" only says what differs
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as
      the Trainer's arguments have them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_foreign``: whether to go on from one without a manifest, though it does not
      prove to be whole
    - ``committed_only``: whether to refuse one without a manifest, also where it proves
      to be whole
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    It stays out of trainings that begin. One without DeepSpeed that goes on from a
    checkpoint of DeepSpeed is stopped: the Trainer would load the weights alone. A
    Trainer with ``CommittedCheckpoints`` takes these options and compares before it
    loads.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        verify: VerifyLevel = "structure",
        on_mismatch: OnMismatch = "error",
        override: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        load_foreign: bool = False,
        committed_only: bool = False,
        timeout: float = TIMEOUT,
    ):
        continuity.require_known(on_mismatch)
        self.checkpoint, self.verify, self.on_mismatch = checkpoint, verify, on_mismatch
        self.override, self.renamed = override, dict(renamed or {})
        self.load_foreign, self.committed_only = load_foreign, committed_only
        self.timeout = timeout
        self.watch = LoadWatch(timeout, self.renamed)
        # of a Trainer that compares before it loads
        self.comparison: Comparison | None = None
        self.new_parts: tuple[str, ...] = ()  # what it begins with new values
        self.loaded_folder: Path | None = None  # what such a Trainer loads
        self.has_compared = False  # such a Trainer, without DeepSpeed

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Compares what was saved with what there is."""
        wrapper, current_step = objects.get("optimizer"), int(state.global_step)
        if not current_step:
            return
        path = Path(self.checkpoint or self.loaded_folder or args.output_dir)
        if not uses_deepspeed(wrapper):
            self._compare_plain(_folder_of(path, current_step), args, state, objects)
            return

        assert wrapper is not None

        ranks = RankGroup("ResumeCallback", self.timeout)
        resume_request = self._request(ranks, path, current_step)
        resume_request.require_same(step=current_step)
        layout = Layout.of_config(deepspeed_config(), ranks.world)
        checkpoint = _select_checkpoint(resume_request)

        with ranks.step():
            checkpoint = _require_checkpoint(checkpoint, path, layout)
            original = _original(checkpoint)

        source = ResumePoint.on_all_ranks(ranks, checkpoint)
        with ranks.step() as results:
            engine = _engine(objects["model"], wrapper.optimizer, ranks.rank, current_step)
            comparison = self._comparison_with(source, engine, args, objects)
            comparison.progress["step"] = source.step
            current = {**progress(engine, state.epoch), "step": current_step}
            rows = comparison.rows(current, [*_uncompared_names(source), *self.new_parts])
            results.value = continuity.mismatches(rows)
            results.value += _missing_random_states(source.folder, args)

        if self.comparison is None and not ranks.rank:
            comparison.say()
        self.comparison = self.loaded_folder = None
        resume_request.tell(source, rows, results.heard)
        committed(ranks, original)  # a training that does not go on leaves nothing behind

    def _compare_plain(self, folder: Path, args: Any, state: Any, objects: Any) -> None:
        """Compares a training without DeepSpeed,
        unless the Trainer has done so when it loaded."""
        has_compared, self.has_compared = self.has_compared, False
        if has_compared:
            return

        ranks = RankGroup("ResumeCallback", self.timeout)
        with ranks.step() as answers:
            plain.require_plain(folder)
            answers.value = folder.is_dir() and open_checkpoint(folder).manifest is not None
        if not answers.heard[0]:
            return  # nothing is noted, or it was resumed from somewhere else

        engine = engine_of(args, objects["model"], objects["optimizer"])
        resume = PlainResume(engine, self, folder, WAYS)
        groups = options_of(args, optimizers.inner(engine))
        scheduler, data = objects.get("lr_scheduler"), objects.get("train_dataloader")
        resume.compare(args, scheduler, data, groups)
        resume.finish(int(state.global_step))

    def _request(self, ranks: RankGroup, path: Path, step: int) -> ResumeRequest:
        """What to look for in ``path``: what the user named,
        or else the checkpoint of ``step``."""
        return ResumeRequest(
            ranks=ranks,
            path=path,
            tag=None if self.checkpoint or self.loaded_folder else str(step),
            verify=self.verify,
            on_mismatch=self.on_mismatch,
            load_foreign=self.load_foreign,
            committed_only=self.committed_only,
            options=LoadOptions(ways=WAYS),
        )

    def _comparison_with(
        self, source: ResumePoint, engine: CallbackEngine, args: Any, objects: Any
    ) -> Comparison:
        """The comparison that a Trainer has made already,
        or one made now that all is loaded."""
        if self.comparison is not None:
            return self.comparison

        request = LoadOptions(names_in(self.override), self.renamed, ways=WAYS)
        scheduler, data = objects.get("lr_scheduler"), objects.get("train_dataloader")
        loop = loop_of(args, scheduler, data)
        groups = options_of(args, optimizers.inner(engine))

        comparison = Comparison(source, engine, request, loop=loop, script_groups=groups)
        comparison.require_here(self.on_mismatch)
        comparison.apply()

        return comparison


def options_of(args: Any, optimizer: Any) -> Sequence[Mapping[str, Any]]:
    """The options of each param group as the script gave them,
    when others are loaded already.

    The optimizer knows what it was made with. Only weight decay is given by groups: the
    Trainer makes one of all weights, and one of norms and biases without decay
    (transformers 5.23 ``trainer.py: get_decay_parameter_names``).
    """
    defaults = optimizer.defaults
    groups = optimizer.param_groups
    script_groups = []

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
        script_groups.append(options)

    return script_groups


def _select_checkpoint(request: ResumeRequest) -> RunCheckpoint | None:
    """The checkpoint that is meant; every rank calls it.
    ``None`` where the run has none yet."""
    options = (request.verify, request.load_foreign, configured.fits(request.ranks))
    return select.select_checkpoint(
        request.ranks,
        request.path,
        request.tag,
        *options,
        committed_only=request.committed_only,
    )


def _original(checkpoint: RunCheckpoint) -> RunCheckpoint:
    """What the checkpoint was made of,
    if that lies beside it; else the checkpoint itself.

    That is what gets a manifest, as what was made of it stays and goes with it.
    """
    siblings = Run(checkpoint.folder.parent).checkpoints()
    return original_of(checkpoint, siblings) or checkpoint


def _engine(model: Any, optimizer: Any, rank: int, step: int) -> CallbackEngine:
    """What a callback can see of DeepSpeed's engine, as a comparison takes it."""
    config = deepspeed_config()
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    return CallbackEngine(model, optimizer, stage, rank, step, config)


def _uncompared_names(source: ResumePoint) -> list[str]:
    """What is not compared: a callback sees the step alone,
    which stands for the counters.

    Nor is the loss scale where the training has another precision than ``source``.
    """
    names = ["global_steps"]
    saved_precision = precision.of_checkpoint(source.folder / source.tag)
    if saved_precision not in (None, precision.of_config(deepspeed_config())):
        names.append("loss_scale")

    return names


def _require_checkpoint(
    checkpoint: RunCheckpoint | None, path: Path, layout: Layout | None
) -> RunCheckpoint:
    """The checkpoint to compare with: what was loaded in the place of the one that was
    chosen; ``CheckpointError`` if none was."""
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint to compare with", "incomplete")

    return checkpoint if layout is None else _checkpoint_loaded(checkpoint, layout)


def _checkpoint_loaded(checkpoint: RunCheckpoint, layout: Layout) -> RunCheckpoint:
    """What the Trainer went on from: ``checkpoint``,
    or its resharding if that loads here."""
    manifest = checkpoint.manifest
    if manifest is None or layout.topology.fits(manifest):
        return checkpoint
    for sibling in Run(checkpoint.folder.parent).checkpoints():
        is_resharding = (
            sibling.committed
            and sibling.step == checkpoint.step
            and sibling.name.startswith(checkpoint.name)
        )
        if (
            is_resharding
            and sibling.manifest is not None
            and layout.topology.fits(sibling.manifest)
        ):
            return sibling
    return checkpoint


def _folder_of(path: Path, step: int) -> Path:
    """The checkpoint of a step in a run; ``path`` itself if it is one of that step."""
    if (path / TRAINER_STATE_NAME).exists() and path.name.endswith(f"-{step}"):
        return path
    return path / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _missing_random_states(folder: Path, args: Any) -> list[str]:
    """A line if the Trainer will not find this rank's random states, else nothing."""
    name = "rng_state.pth"
    if args.world_size > 1:
        name = f"rng_state_{args.process_index}.pth"
    if (folder / name).exists():
        return []
    has_ckpt_states = (folder / rng.NAME.format(args.process_index)).exists()
    hint = ", which is not what the Trainer reads" if has_ckpt_states else ""
    return [f"{name} is not there{hint}: random states are not as they were saved"]
