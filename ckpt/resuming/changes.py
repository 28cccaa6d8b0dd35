"""The differences between the settings at a save and now, and what comes of each.

A pure function of two records (``settings.describe``) and of what the caller asked for.
Each difference is one sentence that says what is used from now on:

    kept       as it was saved, because it comes back with the state: learning rate, betas ...
    yours      as it is now: overridden, or nothing that a checkpoint holds
    refused    unless the caller says that it is meant (``on_mismatch="warn"``)
    wrong      always: it would load the weights or states of others
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckpt.engine import optimizers, parameters, precision
from ckpt.engine.remedies import DEFAULT_WAYS, Ways
from ckpt.resuming.config import config_changes
from ckpt.resuming.value_text import OTHER_FILES, file_form, shown, shown_pair

Effect = Literal["kept", "yours", "refused", "wrong"]
Record = Mapping[str, Any]
# Of a PEFT configuration: what has no part in what the weights that are loaded mean.
OF_NO_MEANING = ("target_modules", "lora_dropout", "exclude_modules")
BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
# What OneCycleLR and CyclicLR add to param groups.
CYCLED = {"max_momentum", "base_momentum"}
# Of the topology: how the work is shared.
FAST = ("sequence_parallel", "world_size", "zero_stage")
# Of the topology, too: what is another where the files were written for it.
DEGREE_SETTINGS = ("tensor_parallel", "expert_parallel.autoep_size:")  # how lines of it begin
DEGREES = ("tensor_parallel", "pipeline_parallel", "expert_parallel")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The wishes of a resume's caller: what is to be otherwise than it was saved.

    ``renamed``: the new name of a parameter, or of the front of names, by the saved one.
    """

    override: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    optimizer_states: bool = True
    scheduler_states: bool = True
    weights_alone: bool = False  # nothing but the module's weights is loaded
    # it was resharded, so a step of other ranks is what is wanted
    other_ranks: bool = False
    ways: Ways = DEFAULT_WAYS


def names_in(override: Collection[str]) -> frozenset[str]:
    """The names in ``override``: a text is one name."""
    return frozenset([override] if isinstance(override, str) else override)


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs; ``line`` is what is said of it."""

    name: str
    effect: Effect
    line: str


def changes(saved: Record, current: Record, request: LoadOptions) -> list[Change]:
    """Each difference between two records;
    what one of them does not tell is not compared."""
    of_weights = (_parameters, _adapters)
    of_training = (_optimizer, _options, _scheduler, _batch, _other_settings)
    comparisons = (*of_weights, *(() if request.weights_alone else of_training))
    return [change for compare in comparisons for change in compare(saved, current, request)]


def _both(saved: Record, current: Record, name: str) -> tuple[Record, Record] | None:
    saved_value, current_value = saved.get(name), current.get(name)
    if isinstance(saved_value, Mapping) and isinstance(current_value, Mapping):
        return saved_value, current_value
    return None


def _parameters(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    pair = _both(saved, current, "parameters")
    if pair is None or (pair[0] == pair[1] and not request.renamed):
        return
    if _has_other_degrees(saved, current, request):
        return  # each rank has others; the files of this rank are looked at when they load

    stage = current.get("topology", {}).get("zero_stage")
    has_no_masters = stage == 0 and current.get("precision") == "fp32"
    if has_no_masters and not request.optimizer_states:
        return  # the module's weights are loaded by name

    saved_parameters = parameters.unpack(pair[0])
    current_parameters = parameters.unpack(pair[1])
    if saved_parameters is None or current_parameters is None:
        return

    # Of another topology the order may be another; the files of it are looked at when
    # they load.
    same_topology = saved.get("topology") == current.get("topology")
    reason = parameters.difference(
        saved_parameters, current_parameters, request.renamed, same_topology
    )
    if reason is not None:
        yield Change("parameters", "wrong", reason)


def _has_other_degrees(saved: Record, current: Record, request: LoadOptions) -> bool:
    """Whether it was written for other tensor-parallel ranks, expert ranks or stages."""
    pair = _both(saved, current, "topology")
    if pair is None or not request.other_ranks:
        return False
    return any(pair[0].get(name) != pair[1].get(name) for name in DEGREES)


def _optimizer(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    pair = _both(saved, current, "optimizer")
    if pair is None or not request.optimizer_states:
        return

    saved_class, current_class = (str(section.get("algorithm")) for section in pair)
    if saved_class == current_class:
        return

    line = f"optimizer: {saved_class} saved, {current_class} now"
    new_optimizer = request.ways.optimizer
    remedy = "use the saved one"
    if new_optimizer:
        remedy = f"{new_optimizer} to begin with a new optimizer"

    if optimizers.has_states_of(saved_class, current_class):
        line += "; they differ in whether weight decay is part of the gradient"
        yield Change("optimizer", "refused", f"{line}: {remedy}")
    else:
        yield Change("optimizer", "wrong", f"{line}, whose states are others: {remedy}")


def _options(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    """Options of param groups, which come back with the optimizer's state."""
    pair = _both(saved, current, "optimizer")
    if pair is None:
        return

    groups = list(zip(pair[0]["groups"], pair[1]["groups"], strict=False))
    scheduled = bool(current.get("scheduler"))
    common_names = (
        name
        for saved_group, current_group in groups
        for name in saved_group
        if name in current_group
    )
    names = list(dict.fromkeys(common_names))
    if scheduled and CYCLED & set(names):
        # they move, too
        names = [name for name in names if name not in ("betas", "momentum")]
    for name in [name for name in names if _comes_back(name, pair, scheduled, request)]:
        option = optimizers.LR if name == optimizers.BASE else name
        if name == optimizers.LR and (scheduled or optimizers.BASE in names):
            # it moves; what it started from is compared, or the scheduler's options
            continue

        differing = [
            (
                index,
                saved_group.get(option, saved_group[name]),
                current_group[name],
                saved_group[name],
            )
            for index, (saved_group, current_group) in enumerate(groups)
            if name in saved_group
            and name in current_group
            and saved_group[name] != current_group[name]
        ]
        if differing:
            yield _option(option, differing, len(groups), pair[1]["algorithm"], request)


def _comes_back(
    name: str,
    pair: tuple[Record, Record],
    scheduled: bool,
    request: LoadOptions,
) -> bool:
    """Whether an option is as it was saved after the load;
    rates come with a scheduler, too."""
    if name in (optimizers.LR, optimizers.BASE) and scheduled:
        return request.scheduler_states
    algorithms = (pair[0]["algorithm"], pair[1]["algorithm"])
    has_same_states = optimizers.has_states_of(*algorithms)
    return request.optimizer_states and has_same_states


def _option(
    name: str, differing: list[Any], count: int, algorithm: str, request: LoadOptions
) -> Change:
    index, saved_value, current_value, base = differing[0]
    of_group = "" if len(differing) == count else f" of param group {index}"
    beginning = f" (it began with {shown(base)})" if saved_value != base else ""
    needs_states = any(optimizers.adds_states(algorithm, name, *row[1:3]) for row in differing)
    hint = "yours needs states that it lacks"
    if name in request.override and needs_states:
        line = f"{shown(current_value)} needs states that it lacks; leave it out of override"
        return Change(name, "wrong", f"{name}{of_group}: {line}")
    if name in request.override:
        line = (
            f"{name}{of_group}: {shown(current_value)} is used, {shown(saved_value)} of "
            "the checkpoint is not"
        )
        return Change(name, "yours", line)

    line = (
        f"{name}{of_group}: {shown(saved_value)} of the checkpoint is "
        f"used{beginning}, {shown(current_value)} was asked for; "
    ) + (hint if needs_states else f'override={{"{name}"}} takes yours')
    return Change(name, "kept", line)


def _scheduler(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    if not request.scheduler_states:
        return
    if "scheduler" not in saved or "scheduler" not in current:
        return

    saved_scheduler, current_scheduler = saved["scheduler"], current["scheduler"]
    if not saved_scheduler or not current_scheduler:
        if saved_scheduler or current_scheduler:
            saved_text, current_text = (
                section["class"] if section else "none"
                for section in (saved_scheduler, current_scheduler)
            )
            effect: Effect = "refused" if saved_scheduler else "yours"
            line = f"scheduler: {saved_text} saved, {current_text} now"
            begins = "; it begins at its start" if current_scheduler else ""
            hint = _new_scheduler_hint(request, effect)
            yield Change("scheduler", effect, line + begins + hint)

        return

    hint = _new_scheduler_hint(request, "refused")
    if saved_scheduler["class"] != current_scheduler["class"]:
        saved_text, current_text = saved_scheduler["class"], current_scheduler["class"]
        line = f"scheduler: {saved_text} saved, {current_text} now"
        yield Change("scheduler", "refused", line + hint)
        return

    saved_options = saved_scheduler.get("options", {})
    current_options = current_scheduler.get("options", {})
    for name in saved_options:
        if name not in current_options or saved_options[name] == current_options[name]:
            continue

        saved_text, current_text = shown_pair(saved_options[name], current_options[name])
        if name in current_scheduler.get("kept", ()):
            line = f"{saved_text} of the checkpoint is used, {current_text} was asked for"
            yield Change(name, "kept", f"scheduler {name}: {line}{hint}")
        else:
            line = f"{current_text} is used from now on, {saved_text} was saved"
            yield Change(name, "yours", f"scheduler {name}: {line}")


def _new_scheduler_hint(request: LoadOptions, effect: Effect) -> str:
    remedy = request.ways.scheduler
    if not remedy or effect != "refused":
        return ""
    return f"; {remedy} to begin with a new scheduler"


def _batch(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    """The samples of a step count; how ranks and accumulation share them does not."""
    pair = _both(saved, current, "batch")
    if pair is None:
        return

    for name in BATCH:
        saved_value, current_value = pair[0].get(name), pair[1].get(name)
        if None in (saved_value, current_value) or current_value == saved_value:
            continue

        line = f"{name}: {saved_value} saved, {current_value} now"
        effect: Effect = "refused" if name == "train_batch_size" else "yours"
        if name == "train_batch_size" and _of_ranks_alone(saved, current):
            remedy = "set gradient_accumulation_steps so that it stays the same"
            line += f" (of other ranks: {remedy})"
            effect = "yours" if request.other_ranks else effect

        yield Change(name, effect, line)


def _of_ranks_alone(saved: Record, current: Record) -> bool:
    """Whether a step has other samples only because the number of ranks is another."""
    topologies = _both(saved, current, "topology")
    batches = _both(saved, current, "batch")
    if topologies is None or batches is None:
        return False
    worlds = [topology.get("world_size") for topology in topologies]
    per_rank = [[batch.get(name) for name in BATCH[1:]] for batch in batches]
    return worlds[0] != worlds[1] and per_rank[0] == per_rank[1]


def _other_settings(
    saved: Record,
    current: Record,
    request: LoadOptions,
) -> Iterator[Change]:
    """Clipping, how the model is cut up, offload, data, what else DeepSpeed is told."""
    for name in ("gradient_clipping", "precision"):
        values = (saved.get(name), current.get(name))
        if values[0] != values[1] and None not in values:
            effect: Effect = "refused" if name == "gradient_clipping" else "yours"
            line = f"{name}: {saved[name]} saved, {current[name]} now"
            yield Change(name, effect, line)

    free_names = (*FAST, *(DEGREES if request.other_ranks else ()))
    sections = (("topology", free_names), ("offload", ("optimizer", "parameters")))
    for section, free_names in sections:
        if (pair := _both(saved, current, section)) is not None:
            yield from _section(section, *pair, free_names)

    if (pair := _both(saved, current, "data")) is not None:
        yield from _section("data", *pair, ())
    if (pair := _both(saved, current, "config")) is not None:
        is_rewritten = _has_other_degrees(saved, current, request)
        for line in config_changes(*precision.unsaid(pair), recorded=True):
            if is_rewritten and line.startswith(DEGREE_SETTINGS):
                continue
            yield Change("config", "refused", f"config: {line}")


def _section(
    section: str, saved: Record, current: Record, free_names: tuple[str, ...]
) -> Iterator[Change]:
    for name, saved_value in saved.items():
        if name in current and current[name] != saved_value:
            effect: Effect = "yours" if name in free_names else "refused"
            title = f"offload of {name}" if section == "offload" else name
            saved_text, current_text = shown_pair(saved_value, current[name])
            line = f"{title}: {saved_text} saved, {current_text} now"
            if name == "sharding" and file_form(saved_value) != file_form(current[name]):
                effect, line = "wrong", f"{line}; {OTHER_FILES}"
            yield Change(title, effect, line)


def _adapters(saved: Record, current: Record, request: LoadOptions) -> Iterator[Change]:
    pair = _both(saved, current, "adapters")
    if pair is None:
        return

    saved_adapters, current_adapters = pair
    for name in dict.fromkeys([*saved_adapters, *current_adapters]):
        if name not in saved_adapters or name not in current_adapters:
            absence = "not here" if name in saved_adapters else "not saved"
            yield Change(f"adapter {name}", "refused", f"adapter {name}: {absence}")
            continue

        for key, saved_value in saved_adapters[name].items():
            current_adapter = current_adapters[name]
            if key not in current_adapter or current_adapter[key] == saved_value:
                continue

            saved_text, current_text = shown_pair(saved_value, current_adapter[key])
            effect: Effect = "yours" if key in OF_NO_MEANING else "refused"
            line = f"adapter {name}: {key}: {saved_text} saved, {current_text} now"
            yield Change(f"adapter {name}", effect, line)
