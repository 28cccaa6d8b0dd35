"""The parameters that an optimizer holds: their names, shapes, order and groups.

A partition of ZeRO has no names: DeepSpeed gives each parameter what lies in its place,
whose it is or not. So a checkpoint loads into a training with the same parameters in
the same order, or it loads the weights of others without a word. They are compared
twice: as the manifest has them, before anything is read, and as DeepSpeed's own files
have them (``param_shapes``), which know the order of stages 1 to 3, with a manifest or
without.
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

from ckpt.engine.view import EngineView, internals
from converters import accessors
from converters.errors import CheckpointError, MalformedError
from converters.words import shape as shape_text

# characters of a list that is packed in a manifest; some 3,000 parameters
LONG = 1 << 18
LARGEST = 64 << 20  # bytes of a list that is unpacked
# What wrappers put into names: torch.compile, checkpoint_wrapper,
# FullyShardedDataParallel; and DistributedDataParallel, in front.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
IN_FRONT = "module."
# Where ZeRO's optimizers keep the parameters by group, the order of partitions first.
_GROUPS = ("round_robin_bit16_groups", "bf16_groups", "bit16_groups", "fp16_groups")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained parameter; ``group`` is the index of its param group."""

    name: str
    shape: tuple[int, ...]
    group: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({shape_text(self.shape)})"

    def record(self) -> str:
        """The line of a manifest, such as "embed.weight [20, 7]",
        which ``_parse`` reads."""
        return f"{self.name} {list(self.shape)}"


def of_engine(engine: EngineView) -> list[Parameter]:
    """The parameters of the engine's optimizer, in its order; none without an optimizer."""
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

    Source: DeepSpeed 0.19.8 ``runtime/engine.py: _get_zero_param_shapes``; those of
    stage 3 are cut into sub groups.
    """
    of_group: Mapping[int, int] = getattr(optimizer, "sub_group_to_group_id", {})
    for name in _GROUPS:
        if groups := getattr(optimizer, name, None):
            for index, values in enumerate(groups):
                group = of_group.get(index, index)
                group = group if isinstance(group, int) else index
                yield from ((group, value) for value in values)
            return

    for index, group in enumerate(optimizer.param_groups):
        yield from ((index, value) for value in group["params"])


def pack(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """JSON for a manifest: a line for each parameter,
    by groups, packed where they are many."""
    last_group = max((parameter.group for parameter in parameters), default=-1)
    groups: list[list[str]] = [[] for _ in range(1 + last_group)]
    for parameter in parameters:
        groups[parameter.group].append(parameter.record())
    text = json.dumps(groups)
    summary = {"count": len(parameters), "digest": sha256(text.encode()).hexdigest()}
    if len(text) <= LONG:
        return {**summary, "groups": groups}

    return {
        **summary,
        "packed": base64.b64encode(zlib.compress(text.encode(), 9)).decode(),
    }


def unpack(packed: Any) -> list[Parameter] | None:
    """The value that ``pack`` packed; ``None`` if it is something else."""
    try:
        summary = accessors.value(packed, dict, "the list")
        groups = summary.get("groups")
        if groups is None:
            groups = _unpacked(accessors.entry(summary, "packed", str))

        return [
            _parse(accessors.value(line, str, "a parameter"), index)
            for index, lines in enumerate(accessors.value(groups, list, "groups"))
            for line in accessors.value(lines, list, "a group")
        ]
    except MalformedError:
        return None


def _unpacked(text: str) -> Any:
    """The groups that ``pack`` compressed."""
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text), LARGEST)
    except (ValueError, zlib.error) as error:
        raise MalformedError("the list cannot be unpacked") from error

    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedError("the list is not JSON") from error


def _parse(line: str, group: int) -> Parameter:
    name, _, shape = line.rpartition(" [")
    sizes = [size.strip() for size in shape.removesuffix("]").split(",") if size.strip()]
    if not all(size.isdecimal() and len(size) < 20 for size in sizes):
        raise MalformedError(f"{line[:80]!r} is not a name and a shape")
    return Parameter(name, tuple(map(int, sizes)), group)


def plain_name(name: str) -> str:
    """A name without what wrappers put into it:
    torch.compile switched on is the same model."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(IN_FRONT):
        name = name.removeprefix(IN_FRONT)
    return name


def new_name(name: str, renamed: Mapping[str, str]) -> str:
    """The present name of a saved parameter;
    a key that ends with a dot is the front of names."""
    if name in renamed:
        return renamed[name]

    fronts = [front for front in renamed if front.endswith(".")]
    prefixes = [front for front in fronts if name.startswith(front)]
    longest = max(prefixes, key=len, default="")
    return renamed[longest] + name.removeprefix(longest) if longest else name


def _comparable(
    parameters: Iterable[Parameter],
    renamed: Mapping[str, str],
) -> list[Parameter]:
    """The parameters under plain names, without empty ones, which not all versions list."""
    with_elements = [parameter for parameter in parameters if 0 not in parameter.shape]
    with_new_names = [replace(entry, name=new_name(entry.name, renamed)) for entry in with_elements]
    with_plain_names = [replace(entry, name=plain_name(entry.name)) for entry in with_new_names]

    # Two that differ in a wrapper alone would become one.
    names = {parameter.name for parameter in with_plain_names}
    return with_plain_names if len(names) == len(with_plain_names) else with_new_names


def difference(
    saved: Sequence[Parameter],
    current: Sequence[Parameter],
    renamed: Mapping[str, str],
    ordered: bool = True,
    grouped: bool = True,
) -> str | None:
    """How the parameters of a checkpoint and of a training differ;
    ``None`` if they do not.

    ``ordered``: whether their order counts; ``grouped``: whether their groups do.
    """
    saved_parameters = _comparable(saved, renamed)
    current_parameters = _comparable(current, {})
    if not ordered:
        saved_parameters.sort(key=lambda parameter: parameter.name)
        current_parameters.sort(key=lambda parameter: parameter.name)

    lists = (saved_parameters, current_parameters)
    for index, pair in enumerate(zip_longest(*lists)):
        saved_parameter, current_parameter = pair
        if (
            saved_parameter is None
            or current_parameter is None
            or saved_parameter.name != current_parameter.name
            or saved_parameter.shape != current_parameter.shape
        ):
            counts = _describe_counts(*lists)
            return (
                f"parameter {index} of the optimizer is "
                f"{saved_parameter or 'nothing'}, in this training it is "
                f"{current_parameter or 'nothing'}, and DeepSpeed would take one for the "
                f"other{counts}{_remedy(*pair, *lists)}"
            )

        if grouped and saved_parameter.group != current_parameter.group:
            return (
                f"{saved_parameter.name} is in param group {saved_parameter.group} of "
                "the checkpoint's optimizer, in this training in group "
                f"{current_parameter.group}: give the optimizer the same groups"
            )

    return None


def _describe_counts(
    saved_parameters: Sequence[Parameter], current_parameters: Sequence[Parameter]
) -> str:
    lost_count = len(_names_only_in(saved_parameters, current_parameters))
    new_count = len(_names_only_in(current_parameters, saved_parameters))
    if not lost_count + new_count:
        return ""
    return f" ({lost_count} that were saved are not here, {new_count} here were not saved)"


def _names_only_in(
    parameters: Sequence[Parameter],
    others: Sequence[Parameter],
) -> set[str]:
    other_names = {parameter.name for parameter in others}
    return {parameter.name for parameter in parameters} - other_names


def _remedy(
    saved_parameter: Parameter | None,
    current_parameter: Parameter | None,
    saved_parameters: Sequence[Parameter],
    current_parameters: Sequence[Parameter],
) -> str:
    """What to do; only a parameter that is on one side alone may be a renamed one."""
    advice = ": give the optimizer the same parameters in the same order"
    if (
        saved_parameter is None
        or current_parameter is None
        or saved_parameter.shape != current_parameter.shape
    ):
        return advice

    saved_name, current_name = saved_parameter.name, current_parameter.name
    if saved_name not in _names_only_in(saved_parameters, current_parameters):
        return advice
    if current_name not in _names_only_in(current_parameters, saved_parameters):
        return advice

    renaming = f'renamed={{"{saved_name}": "{current_name}"}}'
    return f"{advice}, or, if only its name is new, say {renaming}"


def require(
    engine: EngineView,
    saved: Any,
    path: str | os.PathLike[str],
    renamed: Mapping[str, str] | None = None,
) -> None:
    """``CheckpointError`` unless the optimizer has the ``saved`` parameters,
    in the same order.

    ``saved`` is ``param_shapes`` of the file ``path``, shapes by name for each group,
    or ``None``. A universal checkpoint is loaded by name.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    from ckpt.engine import layout  # which knows sources, and so what they note

    if not isinstance(saved, list) or not isinstance(engine.optimizer, ZeROOptimizer):
        # of stage 0; DeepSpeed of old noted the module's parameters, not by groups
        return
    if internals(engine).load_universal_checkpoint():
        return

    groups_of = (saved, internals(engine)._get_zero_param_shapes())
    saved_parameters, current_parameters = (
        [Parameter(name, tuple(shape)) for group in groups for name, shape in group.items()]
        for groups in groups_of
    )
    if saved_parameters == current_parameters and engine.zero_optimization_stage() == 3:
        layout.require_cut(engine, *groups_of, path)

    lists = (saved_parameters, current_parameters)
    reason = difference(*lists, renamed or {}, grouped=False)
    if reason is not None:
        hint = ""
        if getattr(engine.optimizer, "use_muon", False):
            hint = "; Muon sorts them unless the model is made under zero.Init"
        raise CheckpointError(f"{path}: {reason}{hint}", "refused")


def rename_module(
    engine: EngineView, state: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> None:
    """Gives what a state file has by name (``module``,
    frozen weights) the names of the engine.

    Only where the model has no such name, but has it under another wrapper or the new
    name.
    """
    module_state = state.get("module")
    if not isinstance(module_state, dict):
        return

    names = set(engine.module.state_dict())
    if renamed or module_state.keys() - names:
        by_plain_name = {plain_name(name): name for name in names}
        for values in (module_state, state.get("frozen_param_fragments")):
            if isinstance(values, dict):
                _rename_in_place(values, names, by_plain_name, renamed or {})


def _rename_in_place(
    values: dict[str, Any],
    names: set[str],
    by_plain_name: Mapping[str, str],
    renamed: Mapping[str, str],
) -> None:
    """Renames keys in place and in order, as for an ``OrderedDict`` with attributes."""
    for name in list(values):
        target = new_name(name, renamed)
        if target not in names:
            target = by_plain_name.get(plain_name(target), name)
        values[target] = values.pop(name)
