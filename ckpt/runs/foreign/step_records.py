"""Whether the files of a checkpoint are of one step, where several of them say of which.

    trainer_state.json   ``global_step``: what the Trainer counts
    checkpoint-N         its name, which the Trainer makes of the same count
    scheduler.pt         ``last_epoch``: the steps that the optimizer took and did not skip
    DeepSpeed's files    ``global_steps`` of the engine, and the steps of its optimizer
    optimizer.pt         ``step`` of a parameter

One count that differs proves nothing. Whole checkpoints differ in one where a folder was
renamed, a gradient overflowed, several steps of the engine are one of the Trainer (PPO),
a training was called twice, or went on without the optimizer's states. Six things prove
it:

    the name and another file agree, and ``trainer_state.json`` says something else
    counts differ, and so do the learning rates of scheduler and optimizer, which are set
    together, or the values of weights that are stored twice the engine counts other
    steps than the name of its tag and ``trainer_state.json``: the Trainer has DeepSpeed
    make the tag's name of that count the file ``latest`` names the tag of another step,
    and that of the Trainer's lies beside it counts differ, and ``trainer_state.json`` is
    that of another checkpoint, where they do not the weights are those of a checkpoint
    of another step, and were not written with the rest (``copied_files``)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ckpt.runs.foreign import histories, intact_files
from ckpt.runs.recognition import is_numbered, step_in
from converters.accessors import is_number, is_whole_number
from converters.detect import detect, filenames
from converters.errors import CheckpointError
from converters.source import Source
from converters.storage.store import is_url
from converters.zero import step_counts
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.discovery import is_tag_folder

_SCHEDULER = "scheduler.pt"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_REMEDY = "bring back the files of one step"
_MAX_STEPS = 64  # parameters whose step is read: as a rule all have the same
Rates = Sequence[float]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The step that a part of a checkpoint is of,
    and the learning rates that it has, if any."""

    part: str
    step: int | None
    rates: Rates = ()

    @property
    def words(self) -> str:
        """The part and its step, such as "scheduler.pt of step 8"."""
        return f"{self.part} of step {self.step}"


def require_one_save(checkpoint: Checkpoint) -> None:
    """``CheckpointError`` where the model file
    and the optimizer's files are of different steps.

    The counts alone prove nothing: a training may have gone on without the optimizer's
    states, and DeepSpeed before 0.10 counted one step of the optimizer more. The values
    have to contradict each other as well.
    """
    from ckpt.runs.foreign import value_samples

    reason = step_counts.contradiction(checkpoint)
    if reason is not None and value_samples.compare(checkpoint).contradiction is not None:
        raise CheckpointError(
            f"{checkpoint.place.folder} holds files of two saves: {reason}; bring back those of "
            "one save",
            "incomplete",
        )


def require_one_step(folder: Path, step: int, checkpoint: Checkpoint | None = None) -> None:
    """``CheckpointError`` where the files
    in a Trainer's folder are proven to be of two steps.

    ``step`` is that of ``trainer_state.json``; ``checkpoint`` what DeepSpeed saved, if
    it did.
    """
    state = StepRecord(filenames.TRAINER_STATE, step)
    scheduler, optimizer = _stored(folder, checkpoint)
    records = [record for record in (scheduler, optimizer) if record.step is not None]
    differing = [record for record in records if record.step != step]
    if not differing:
        return  # whatever the name says: somebody has renamed it

    name_step = step_in(folder.name) if is_numbered(folder) else None
    agreeing = [record for record in records if record.step == name_step]
    if name_step != step and agreeing:
        raise CheckpointError(
            f"{folder} holds files of two steps: {state.words}, but {agreeing[0].words}, as its "
            f"name says; {_REMEDY}",
            "incomplete",
        )

    finding = _unequal_rates(scheduler, optimizer)
    if finding is None and checkpoint is not None and optimizer in differing:
        finding = _unequal_values(checkpoint)
    if finding is None:
        finding = _copied_state(folder, step, (scheduler, optimizer))
    if finding is not None:
        others = ", ".join(record.words for record in differing)
        raise CheckpointError(
            f"{folder} holds files of two steps: {state.words}, {others}, and {finding}; {_REMEDY}",
            "incomplete",
        )
    if checkpoint is not None and optimizer in differing:
        _require_tag(folder, state, optimizer, checkpoint)


def contradictions(source: Source) -> Iterator[str]:
    """A line for whoever takes weights or states of a Trainer's checkpoint whose files are
    proven to be of two steps, so that no resume takes it."""
    folder = source.place.root
    if is_url(folder) or not (folder / filenames.TRAINER_STATE).is_file():
        return

    checkpoint = source if isinstance(source, Checkpoint) and source.kind == "deepspeed" else None
    try:
        require_one_step(folder, histories.stated_step(folder), checkpoint)
    except CheckpointError as error:
        yield f"incomplete: {error}; its states are taken as they are"


def _require_tag(
    folder: Path, state: StepRecord, engine: StepRecord, checkpoint: Checkpoint
) -> None:
    """``CheckpointError`` where the engine's files
    are not those that the Trainer had saved.

    ``engine`` counts other steps than ``state``, which proves nothing if its tag has the
    engine's number, and no tag has the Trainer's.
    """
    own_tag = f"global_step{state.step}"
    if checkpoint.place.tag == own_tag:
        raise CheckpointError(
            f"{folder} holds files of two steps: {state.words} and the folder {own_tag}, but the "
            f"files in it are of step {engine.step}; {_REMEDY}",
            "incomplete",
        )

    own_folder = folder / own_tag
    has_own_tag = own_folder.is_dir() and is_tag_folder(own_folder)
    if not has_own_tag or not is_whole_number(engine.step):
        return
    # train(), called a second time, leaves its first tag beside a newer one of more
    # steps
    is_newer = _time_of(checkpoint.place.folder) > _time_of(own_folder)
    if engine.step < (state.step or 0) or not is_newer:
        raise CheckpointError(
            f"{folder} holds files of two steps: its file latest names {engine.words}, but "
            f"{state.words}, and {own_tag} lies beside it; make latest name {own_tag}, or bring "
            "back the files of one step",
            "incomplete",
        )


def require_own_weights(folder: Path, step: int) -> None:
    """``CheckpointError`` where the weights
    in a Trainer's folder are proven to be of another one.

    ``step`` is that of its ``trainer_state.json``. The optimizer's states say nothing of
    the weights, so that this is seen only where the checkpoint of the other step lies
    beside it.
    """
    from ckpt.runs.foreign import copied_files  # which a conversion has no use for

    copy = copied_files.weights_of_another(folder)
    if copy is None:
        return

    path, original = copy
    raise CheckpointError(
        f"{folder} holds files of two steps: {filenames.TRAINER_STATE} of step {step}, but "
        f"{path.name} is that of {original.parent.name}, with the same bytes, and was not written "
        f"together with the other files; {_REMEDY}",
        "incomplete",
    )


def _copied_state(folder: Path, step: int, records: Sequence[StepRecord]) -> str | None:
    """That ``trainer_state.json`` is a copy of that of another checkpoint, whose files
    are of ``step``, as those of ``records`` are not; ``None`` where there is none."""
    from ckpt.runs.foreign import copied_files  # which a conversion has no use for

    for path in copied_files.twins(folder / filenames.TRAINER_STATE):
        sibling = path.parent
        try:
            is_of_deepspeed = any(map(is_tag_folder, filter(Path.is_dir, sibling.iterdir())))
            source = detect(sibling).read() if is_of_deepspeed else None
            checkpoint = source if isinstance(source, Checkpoint) else None
            sibling_records = _stored(sibling, checkpoint)
        except CheckpointError:
            continue  # what is damaged proves nothing

        differing = [
            sibling_record
            for record, sibling_record in zip(records, sibling_records, strict=True)
            if record.step not in (None, step)
        ]
        if all(sibling_record.step == step for sibling_record in differing):
            return f"{path.name} is that of {sibling.name}"

    return None


def _stored(folder: Path, checkpoint: Checkpoint | None) -> tuple[StepRecord, StepRecord]:
    """What scheduler and optimizer say; ``checkpoint`` is what DeepSpeed saved,
    if it did."""
    scheduler = _of_scheduler(folder / _SCHEDULER)
    return scheduler, _of_optimizer(folder) if checkpoint is None else _of_engine(checkpoint)


def _time_of(folder: Path) -> int:
    """When the newest file of a tag was written."""
    return max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0)


def _of_scheduler(path: Path) -> StepRecord:
    """What ``scheduler.pt`` says;
    without a step where it is absent or counts something else."""
    content = intact_files.require_torch_file(path) if path.is_file() else None
    fields: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    is_by_metric = "patience" in fields  # ReduceLROnPlateau counts evaluations
    steps = None if is_by_metric else fields.get("last_epoch")

    return StepRecord(
        path.name, steps if is_whole_number(steps) else None, _numbers(fields.get("_last_lr"))
    )


def _of_engine(checkpoint: Checkpoint) -> StepRecord:
    """What DeepSpeed's files say."""
    facts = state_files.progress(checkpoint.ranks[0]) if checkpoint.ranks else {}
    rates = [value for key, value in facts.items() if key.startswith("learning rate of group")]

    return StepRecord(checkpoint.place.tag, checkpoint.step, _numbers(rates))


def _of_optimizer(folder: Path) -> StepRecord:
    """What the optimizer's file of a Trainer without DeepSpeed says."""
    path = next((folder / name for name in _OPTIMIZERS if (folder / name).is_file()), None)
    content = intact_files.require_torch_file(path) if path is not None else None
    if path is None or not isinstance(content, Mapping):
        return StepRecord("optimizer", None)

    steps = [int(value) for value in _steps(content.get("state"))]
    groups = content.get("param_groups")
    group_list = groups if isinstance(groups, list) else []
    rates = [group.get("lr") for group in group_list if isinstance(group, Mapping)]

    return StepRecord(path.name, max(steps, default=None), _numbers(rates))


def _steps(states: object) -> Iterator[float]:
    """The steps of parameters that an optimizer counts."""
    state_list = states.values() if isinstance(states, Mapping) else ()
    for state in islice(state_list, _MAX_STEPS):
        value = state_files.scalar(state.get("step")) if isinstance(state, Mapping) else None
        if is_number(value) and math.isfinite(value):
            yield value


def _numbers(values: object) -> Rates:
    """The numbers in a list; none if anything else is in it."""
    if not isinstance(values, list) or not all(map(is_number, values)):
        return ()
    return [float(value) for value in values]


def _unequal_rates(scheduler: StepRecord, optimizer: StepRecord) -> str | None:
    """That the scheduler did not set the optimizer's learning rates;
    ``None`` if it may have."""
    pairs = list(zip(scheduler.rates, optimizer.rates, strict=False))
    if not pairs or len(scheduler.rates) != len(optimizer.rates):
        return None

    for scheduler_rate, rate in pairs:
        if not math.isclose(scheduler_rate, rate, rel_tol=1e-6, abs_tol=1e-15):
            return (
                f"the learning rate is {scheduler_rate:.6g} in {scheduler.part} and {rate:.6g} in "
                f"{optimizer.part}"
            )

    return None


def _unequal_values(checkpoint: Checkpoint) -> str | None:
    """That the weights beside DeepSpeed's files are not those of its states."""
    from ckpt.runs.foreign import value_samples

    contradiction = value_samples.compare_beside(checkpoint).contradiction
    if contradiction is None:
        return None

    name, _, copy_path = contradiction
    return f"{copy_path.name} holds other values of {name}"
