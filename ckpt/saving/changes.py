"""What differs between the settings at a save and now, and what comes of each difference.

A pure function of two records (``settings.describe``) and of what the caller asked for. Each
difference is one sentence that says what is used from now on:

    kept       as it was saved, because it comes back with the state: learning rate, betas ...
    yours      as it is now: overridden, or nothing that a checkpoint holds
    refused    unless the caller says that it is meant (``on_mismatch="warn"``)
    wrong      always: it would load the weights or states of others
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckpt.saving import optimizers, parameters, precision
from ckpt.saving.config import config_changes
from ckpt.saving.values import shown, shown_pair
from ckpt.saving.ways import DEFAULT_WAYS, Ways

Effect = Literal["kept", "yours", "refused", "wrong"]
Record = Mapping[str, Any]
# Of a PEFT configuration: what has no part in what the weights that are loaded mean.
OF_NO_MEANING = ("target_modules", "lora_dropout", "exclude_modules")
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
CYCLED = {"max_momentum", "base_momentum"}  # what OneCycleLR and CyclicLR add to param groups
FAST = ("sequence_parallel", "world_size", "zero_stage")  # of the topology: how the work is shared


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller of a resume wants to be otherwise than it was saved.

    ``renamed``: the new name of a parameter, or of the front of names, by the saved one.
    """

    override: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    optimizer_states: bool = True
    scheduler_states: bool = True
    weights_alone: bool = False  # nothing but the module's weights is loaded
    other_ranks: bool = False  # it was resharded, so a step of other ranks is what is wanted
    ways: Ways = DEFAULT_WAYS


def names_in(override: Collection[str]) -> frozenset[str]:
    """What ``override`` names: a text is one name."""
    return frozenset([override] if isinstance(override, str) else override)


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs; ``line`` is what is said of it."""

    name: str
    effect: Effect
    line: str


def changes(saved: Record, now: Record, request: Request) -> list[Change]:
    """Each difference between two records; what one of them does not tell is not compared."""
    of_weights = (_parameters, _adapters)
    rest = () if request.weights_alone else (_optimizer, _options, _scheduler, _batch, _rest)
    return [change for compare in (*of_weights, *rest) for change in compare(saved, now, request)]


def _both(saved: Record, now: Record, name: str) -> tuple[Record, Record] | None:
    then, value = saved.get(name), now.get(name)
    return (then, value) if isinstance(then, Mapping) and isinstance(value, Mapping) else None


def _parameters(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    pair = _both(saved, now, "parameters")
    if pair is None or (pair[0] == pair[1] and not request.renamed):
        return
    whole = now.get("topology", {}).get("zero_stage") == 0 and now.get("precision") == "fp32"
    if whole and not request.optimizer_states:
        return  # the module's weights are loaded by name
    there, here = parameters.unpack(pair[0]), parameters.unpack(pair[1])
    if there is None or here is None:
        return
    # Of another topology the order may be another; the files of it are looked at when they load.
    ordered = saved.get("topology") == now.get("topology")
    why = parameters.difference(there, here, request.renamed, ordered)
    if why is not None:
        yield Change("parameters", "wrong", why)


def _optimizer(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    pair = _both(saved, now, "optimizer")
    if pair is None or not request.optimizer_states:
        return
    then, value = (str(each.get("algorithm")) for each in pair)
    if then == value:
        return
    line = f"optimizer: {then} saved, {value} now"
    anew = request.ways.optimizer
    how = f"{anew} to begin with a new optimizer" if anew else "use the saved one"
    if optimizers.has_states_of(then, value):
        line += "; they differ in whether weight decay is part of the gradient"
        yield Change("optimizer", "refused", f"{line}: {how}")
    else:
        yield Change("optimizer", "wrong", f"{line}, whose states are others: {how}")


def _options(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    """Options of param groups, which come back with the optimizer's state."""
    pair = _both(saved, now, "optimizer")
    if pair is None:
        return
    groups = list(zip(pair[0]["groups"], pair[1]["groups"], strict=False))
    scheduled = bool(now.get("scheduler"))
    names = list(dict.fromkeys(name for then, value in groups for name in then if name in value))
    if scheduled and CYCLED & set(names):
        names = [name for name in names if name not in ("betas", "momentum")]  # they move, too
    for name in [name for name in names if _comes_back(name, pair, scheduled, request)]:
        option = optimizers.LR if name == optimizers.BASE else name
        if name == optimizers.LR and (scheduled or optimizers.BASE in names):
            continue  # it moves; what it started from is compared, or the scheduler's options
        differing = [
            (index, then.get(option, then[name]), value[name], then[name])
            for index, (then, value) in enumerate(groups)
            if name in then and name in value and then[name] != value[name]
        ]
        if differing:
            yield _option(option, differing, len(groups), request)


def _comes_back(name: str, pair: tuple[Record, Record], scheduled: bool, request: Request) -> bool:
    """Whether an option is as it was saved after the load; rates come with a scheduler, too."""
    if name in (optimizers.LR, optimizers.BASE) and scheduled:
        return request.scheduler_states
    fits = optimizers.has_states_of(pair[0]["algorithm"], pair[1]["algorithm"])
    return request.optimizer_states and fits


def _option(name: str, differing: list[Any], count: int, request: Request) -> Change:
    index, used, asked, base = differing[0]
    where = "" if len(differing) == count else f" of param group {index}"
    start = f" (it began with {shown(base)})" if used != base else ""
    if name in request.override:
        line = f"{name}{where}: {shown(asked)} is used, {shown(used)} of the checkpoint is not"
        return Change(name, "yours", line)
    line = (
        f"{name}{where}: {shown(used)} of the checkpoint is used{start}, {shown(asked)} was asked "
        f'for; override={{"{name}"}} takes yours'
    )
    return Change(name, "kept", line)


def _scheduler(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    if "scheduler" not in saved or "scheduler" not in now or not request.scheduler_states:
        return
    then, value = saved["scheduler"], now["scheduler"]
    if not then or not value:
        if then or value:
            one, other = (each["class"] if each else "none" for each in (then, value))
            effect: Effect = "refused" if then else "yours"
            line = f"scheduler: {one} saved, {other} now"
            begins = "; it begins at its start" if value else ""
            yield Change("scheduler", effect, line + begins + _anew(request, effect))
        return
    if then["class"] != value["class"]:
        line = f"scheduler: {then['class']} saved, {value['class']} now"
        yield Change("scheduler", "refused", line + _anew(request, "refused"))
        return
    options, asked = then.get("options", {}), value.get("options", {})
    for name in options:
        if name not in asked or options[name] == asked[name]:
            continue
        one, other = shown_pair(options[name], asked[name])
        if name in value.get("kept", ()):
            line = f"scheduler {name}: {one} of the checkpoint is used, {other} was asked for"
            yield Change(name, "kept", line + _anew(request, "refused"))
        else:
            line = f"scheduler {name}: {other} is used from now on, {one} was saved"
            yield Change(name, "yours", line)


def _anew(request: Request, effect: Effect) -> str:
    way = request.ways.scheduler
    return f"; {way} to begin with a new scheduler" if way and effect == "refused" else ""


def _batch(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    """The samples of a step count; how ranks and accumulation share them does not."""
    pair = _both(saved, now, "batch")
    if pair is None:
        return
    for name in BATCH:
        then, value = pair[0].get(name), pair[1].get(name)
        if None in (then, value) or value == then:
            continue
        line = f"{name}: {then} saved, {value} now"
        effect: Effect = "refused" if name == "train_batch_size" else "yours"
        if name == "train_batch_size" and _of_ranks_alone(saved, now):
            line += " (of other ranks: set gradient_accumulation_steps so that it stays the same)"
            effect = "yours" if request.other_ranks else effect
        yield Change(name, effect, line)


def _of_ranks_alone(saved: Record, now: Record) -> bool:
    """Whether a step has other samples only because the number of ranks is another."""
    topologies = _both(saved, now, "topology")
    batches = _both(saved, now, "batch")
    if topologies is None or batches is None:
        return False
    worlds = [topology.get("world_size") for topology in topologies]
    per_rank = [[batch.get(name) for name in BATCH[1:]] for batch in batches]
    return worlds[0] != worlds[1] and per_rank[0] == per_rank[1]


def _rest(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    """Clipping, how the model is cut up, offload, data, what else DeepSpeed is told."""
    for name in ("gradient_clipping", "precision"):
        if saved.get(name) != now.get(name) and None not in (saved.get(name), now.get(name)):
            effect: Effect = "refused" if name == "gradient_clipping" else "yours"
            yield Change(name, effect, f"{name}: {saved[name]} saved, {now[name]} now")
    for section, plain in (("topology", FAST), ("offload", ("optimizer", "parameters"))):
        if (pair := _both(saved, now, section)) is not None:
            yield from _section(section, *pair, plain)
    if (pair := _both(saved, now, "data")) is not None:
        yield from _section("data", *pair, ())
    if (pair := _both(saved, now, "config")) is not None:
        for line in config_changes(*precision.unsaid(pair), recorded=True):
            yield Change("config", "refused", f"config: {line}")


def _section(section: str, saved: Record, now: Record, plain: tuple[str, ...]) -> Iterator[Change]:
    for name, then in saved.items():
        if name in now and now[name] != then:
            effect: Effect = "yours" if name in plain else "refused"
            title = f"offload of {name}" if section == "offload" else name
            yield Change(title, effect, f"{title}: {then} saved, {now[name]} now")


def _adapters(saved: Record, now: Record, request: Request) -> Iterator[Change]:
    pair = _both(saved, now, "adapters")
    if pair is None:
        return
    there, here = pair
    for name in [*there, *(each for each in here if each not in there)]:
        if name not in there or name not in here:
            where = "not here" if name in there else "not saved"
            yield Change(f"adapter {name}", "refused", f"adapter {name}: {where}")
            continue
        for key, then in there[name].items():
            if key not in here[name] or here[name][key] == then:
                continue
            one, other = shown_pair(then, here[name][key])
            effect: Effect = "yours" if key in OF_NO_MEANING else "refused"
            line = f"adapter {name}: {key}: {one} saved, {other} now"
            yield Change(f"adapter {name}", effect, line)
