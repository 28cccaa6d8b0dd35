"""The parameters that an optimizer holds: their names, shapes, order and groups.

A partition of ZeRO has no names: DeepSpeed gives each parameter what lies in its place, whose it is
or not. So a checkpoint loads into a training with the same parameters in the same order, or it
loads the weights of others without a word. They are compared twice: as the manifest has them,
before anything is read, and as DeepSpeed's own files have them (``param_shapes``), which know the
order of stages 1 to 3, with a manifest or without.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import zip_longest
from typing import Any

from ckpt.saving import layout
from converters.errors import CheckpointError

LONG = 1 << 18  # characters of a list that is packed in a manifest; some 3,000 parameters
LARGEST = 64 << 20  # bytes of a list that is unpacked
# What wrappers put into names: torch.compile, checkpoint_wrapper, FullyShardedDataParallel; and
# DistributedDataParallel, in front.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
IN_FRONT = "module."


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained parameter; ``group`` is the index of its param group."""

    name: str
    shape: tuple[int, ...]
    group: int = 0

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


def of_engine(engine: Any) -> list[Parameter]:
    """Those of the engine's optimizer, in its order; none without an optimizer."""
    optimizer = engine.optimizer
    if optimizer is None:
        return []
    names = {id(value): name for name, value in engine.module.named_parameters()}
    return [
        Parameter(names[id(value)], tuple(getattr(value, "ds_shape", value.shape)), group)
        for group, value in _in_order(optimizer)
        if id(value) in names
    ]


def _in_order(optimizer: Any) -> Iterator[tuple[int, Any]]:
    """Each parameter with its group, in the order of the flat partitions.

    Source: DeepSpeed 0.19.8 ``runtime/engine.py: _get_zero_param_shapes``; those of stage 3 are cut
    into sub groups.
    """
    of_group: Mapping[int, int] = getattr(optimizer, "sub_group_to_group_id", {})
    for name in ("round_robin_bit16_groups", "bf16_groups", "bit16_groups", "fp16_groups"):
        if groups := getattr(optimizer, name, None):
            for index, values in enumerate(groups):
                group = of_group.get(index, index)
                yield from ((group if isinstance(group, int) else index, value) for value in values)
            return
    for index, group in enumerate(optimizer.param_groups):
        yield from ((index, value) for value in group["params"])


def pack(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """As JSON for a manifest: a line for each parameter, by groups, packed where they are many."""
    groups: list[list[str]] = [
        [] for _ in range(1 + max((p.group for p in parameters), default=-1))
    ]
    for parameter in parameters:
        groups[parameter.group].append(str(parameter))
    text = json.dumps(groups)
    found = {"count": len(parameters), "digest": sha256(text.encode()).hexdigest()}
    if len(text) <= LONG:
        return {**found, "groups": groups}
    return {**found, "packed": base64.b64encode(zlib.compress(text.encode(), 9)).decode()}


def unpack(found: Any) -> list[Parameter] | None:
    """What ``pack`` made; ``None`` if it is something else."""
    try:
        groups = found.get("groups")
        if groups is None:
            data = zlib.decompressobj().decompress(base64.b64decode(found["packed"]), LARGEST)
            groups = json.loads(data)
        return [_parsed(line, index) for index, lines in enumerate(groups) for line in lines]
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error, RecursionError):
        return None


def _parsed(line: str, group: int) -> Parameter:
    name, _, shape = line.rpartition(" [")
    sizes = shape.removesuffix("]")
    return Parameter(name, tuple(int(size) for size in sizes.split(",") if size.strip()), group)


def plain_name(name: str) -> str:
    """A name without what wrappers put into it: torch.compile switched on is the same model."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(IN_FRONT):
        name = name.removeprefix(IN_FRONT)
    return name


def new_name(name: str, renamed: Mapping[str, str]) -> str:
    """What a saved parameter is called now; a key that ends with a dot is the front of names."""
    if name in renamed:
        return renamed[name]
    fronts = [old for old in renamed if old.endswith(".") and name.startswith(old)]
    longest = max(fronts, key=len, default="")
    return renamed[longest] + name.removeprefix(longest) if longest else name


def _comparable(parameters: Iterable[Parameter], renamed: Mapping[str, str]) -> list[Parameter]:
    """Under plain names, those without elements left out: not all versions list them."""
    given = [p for p in parameters if 0 not in p.shape]
    named = [replace(p, name=new_name(p.name, renamed)) for p in given]
    plain = [replace(p, name=plain_name(p.name)) for p in named]
    return plain if len({p.name for p in plain}) == len(plain) else named


def difference(
    saved: Sequence[Parameter],
    now: Sequence[Parameter],
    renamed: Mapping[str, str],
    ordered: bool = True,
    grouped: bool = True,
) -> str | None:
    """How the parameters of a checkpoint and of a training differ; ``None`` if they do not.

    ``ordered``: whether their order counts; ``grouped``: whether their groups do.
    """
    there, here = _comparable(saved, renamed), _comparable(now, {})
    if not ordered:
        there, here = sorted(there, key=lambda p: p.name), sorted(here, key=lambda p: p.name)
    for index, (then, value) in enumerate(zip_longest(there, here)):
        if then is None or value is None or (then.name, then.shape) != (value.name, value.shape):
            return (
                f"parameter {index} of the optimizer is {then or 'nothing'}, in this training it "
                f"is {value or 'nothing'}, and DeepSpeed would take one for the other"
                f"{_counted(there, here)}{_way(then, value, there, here)}"
            )
        if grouped and then.group != value.group:
            return (
                f"{then.name} is in param group {then.group} of the checkpoint's optimizer, in "
                f"this training in group {value.group}: give it the same groups"
            )
    return None


def _counted(there: Sequence[Parameter], here: Sequence[Parameter]) -> str:
    lost, new = len(_without(there, here)), len(_without(here, there))
    return (
        f" ({lost} that were saved are not here, {new} here were not saved)" if lost + new else ""
    )


def _without(some: Sequence[Parameter], others: Sequence[Parameter]) -> set[str]:
    return {p.name for p in some} - {p.name for p in others}


def _way(
    then: Parameter | None,
    value: Parameter | None,
    there: Sequence[Parameter],
    here: Sequence[Parameter],
) -> str:
    """What to do about it; only a parameter that is on one side alone may be a renamed one."""
    same = ": give it the same parameters in the same order"
    if then is None or value is None or then.shape != value.shape:
        return same
    if then.name not in _without(there, here) or value.name not in _without(here, there):
        return same
    return f'{same}, or, if only its name is new, say renamed={{"{then.name}": "{value.name}"}}'


def require(
    engine: Any,
    saved: Any,
    path: str | os.PathLike[str],
    renamed: Mapping[str, str] | None = None,
) -> None:
    """``CheckpointError`` unless the optimizer has the ``saved`` parameters, in the same order.

    ``saved`` is ``param_shapes`` of the file ``path``, shapes by name for each group, or ``None``.
    A universal checkpoint is loaded by name.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    if not isinstance(saved, list) or not isinstance(engine.optimizer, ZeROOptimizer):
        return  # of stage 0; DeepSpeed of old noted the module's parameters, not by groups
    if engine.load_universal_checkpoint():
        return
    groups_of = (saved, engine._get_zero_param_shapes())
    there, here = (
        [Parameter(name, tuple(shape)) for group in groups for name, shape in group.items()]
        for groups in groups_of
    )
    if there == here and engine.zero_optimization_stage() == 3:
        layout.require_cut(engine, *groups_of, path)
    why = difference(there, here, renamed or {}, grouped=False)
    if why is not None:
        muon = getattr(engine.optimizer, "use_muon", False)
        more = "; Muon sorts them unless the model is made under zero.Init" if muon else ""
        raise CheckpointError(f"{path}: {why}{more}", "refused")


def rename_module(
    engine: Any, state: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> None:
    """Gives what a state file has by name (``module``, frozen weights) the names of the engine.

    Only where the model has no such name, but has it under another wrapper or the new name.
    """
    there = state.get("module")
    if not isinstance(there, dict):
        return
    names = set(engine.module.state_dict())
    if renamed or there.keys() - names:
        by_plain_name = {plain_name(name): name for name in names}
        for values in (there, state.get("frozen_param_fragments")):
            if isinstance(values, dict):
                _rename(values, names, by_plain_name, renamed or {})


def _rename(
    values: dict[str, Any],
    names: set[str],
    by_plain_name: Mapping[str, str],
    renamed: Mapping[str, str],
) -> None:
    """In place and in order: it may be an ``OrderedDict`` with attributes."""
    for name in list(values):
        target = new_name(name, renamed)
        if target not in names:
            target = by_plain_name.get(plain_name(target), name)
        values[target] = values.pop(name)
