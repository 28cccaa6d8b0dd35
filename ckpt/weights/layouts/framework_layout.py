"""Weights under the names of the model in transformers,
where another framework gave them others.

    pipeline    3.attention.query_key_value.weight       the number of a layer, functions counted
    Megatron    language_model.encoder.layers.1.self_attention.query_key_value.weight
    AutoEP      model.layers.1.mlp.experts.w1            of all experts, stacked
    model       gpt_neox.layers.1.attention.query_key_value.weight

Which names become which is in tables that are shipped (``framework_tables``). Some
tensors are cut or joined: Megatron's queries, keys and values of all groups are one
tensor, as are the gates and inputs of an MLP. No value changes. Sources: Megatron-LM
``tools/checkpoint`` (``loader_llama``), GPT-NeoX ``tools/ckpts/convert_neox_to_hf.py``,
DeepSpeed 0.19.8 ``module_inject/auto_ep_layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.weights.layouts import framework_tables, hub_layout
from ckpt.weights.layouts.framework_tables import NameRule, NameTable, TemplateMatch
from ckpt.weights.layouts.hub_layout import HubLayout
from ckpt.weights.layouts.operations import NotArrangedError
from ckpt.weights.layouts.reverting import Arranged, Reverted, require_different
from ckpt.weights.reader.lengths import look_up
from converters.computing.arrangement import View
from converters.errors import CheckpointError
from converters.names import selection
from converters.options import CONFIG, NAMES, RENAME
from converters.tensors import TensorRef, Weights
from converters.words import counted, some

Config = Mapping[str, Any]
Operation = Callable[[Sequence[TensorRef], Config], list[TensorRef]]


def _advice() -> str:
    """The end of a message on names that no table has."""
    return f"; name the checkpoint's own model with {CONFIG}, or give these names with {RENAME}"


@dataclass(slots=True)
class _Group:
    """Names that one rule takes together, by their templates, and the new names."""

    rule: NameRule
    targets: tuple[str, ...]
    members: dict[str, str] = field(default_factory=dict)


def of(weights: Weights, config: Config | None) -> HubLayout:
    """The weights under the model's names;
    as they are, without a rule, where nothing is to do.

    ``CheckpointError`` where the names are another framework's, and no table has all of
    them.
    """
    names = hub_layout.every_name(weights)
    candidates = _candidates(names, config)
    if not candidates:
        _refuse_foreign(names, config)
        return HubLayout(weights)

    fitting_candidates = [each for each in candidates if not _unknown(names, *each)]
    if not fitting_candidates:
        table, matches = max(candidates, key=lambda each: len(each[1]))
        unknown_names = some(_unknown(names, table, matches))
        raise CheckpointError(
            f"{NAMES('hf')} takes these for {table.framework} names, and has no "
            f"{(config or {}).get('model_type')} name for {unknown_names}{_advice()}",
            "refused",
        )

    table, matches = fitting_candidates[0]
    try:
        return _changed(weights, table, matches, config or {})
    except NotArrangedError as error:
        raise CheckpointError(
            f"{NAMES('hf')} takes these for {table.framework} names: {error}{_advice()}",
            "refused",
        ) from error


def framework_of(names: Collection[str], config: Config | None) -> str | None:
    """The framework that names which the model does not have are of;
    ``None`` if none is known."""
    candidates = _candidates(names, config)
    fitting_tables = [each[0] for each in candidates if not _unknown(names, *each)]
    return fitting_tables[0].framework if fitting_tables else None


def _candidates(
    names: Collection[str], config: Config | None
) -> list[tuple[NameTable, dict[str, TemplateMatch]]]:
    """The tables for a type of model that have any of the names, with these."""
    model_type = (config or {}).get("model_type")
    tables = [
        table
        for table in framework_tables.tables()
        if model_type in table.model_types or (config is None and not table.is_whole)
    ]
    candidates = [(table, framework_tables.matches_of(table, names)) for table in tables]
    return [(table, matches) for table, matches in candidates if matches]


def _refuse_foreign(names: Collection[str], config: Config | None) -> None:
    """Raises for names of another framework that no table of this type of model has."""
    for table in framework_tables.tables():
        matches = framework_tables.matches_of(table, names)
        if not table.is_whole or 2 * len(matches) < len(names):
            continue
        if config is None:
            raise CheckpointError(
                f"{NAMES('hf')} needs the config.json of the model, which says what its layers "
                f"are called; name it, or its folder, with {CONFIG}",
                "refused",
            )
        raise CheckpointError(
            f"{NAMES('hf')} has no table for the model_type {config.get('model_type')!r} with "
            f"{table.framework} names such as {next(iter(matches))}; give the names with {RENAME}",
            "refused",
        )


def _unknown(
    names: Collection[str], table: NameTable, matches: Mapping[str, TemplateMatch]
) -> list[str]:
    """The names that a table should have, and has not."""
    return [name for name in names if name not in matches] if table.is_whole else []


def _changed(
    weights: Weights, table: NameTable, matches: Mapping[str, TemplateMatch], config: Config
) -> HubLayout:
    """The weights with the changes of a table."""
    surplus = frozenset(name for name, match in matches.items() if not match.rule.targets)
    for name in surplus:
        if name in weights.tensors and name not in weights.buffers:
            raise NotArrangedError(f"{name} is a parameter, which the model does not have")

    names = [name for name in hub_layout.every_name(weights) if name not in surplus]
    remaining = selection.selected(weights, frozenset(names)) if surplus else weights
    groups, new_names = _grouped(names, matches)
    _require_layers(matches, config)
    arranged = [each for group in groups for each in _arranged(group, remaining, config)]
    require_different([*new_names.values(), *(each.name for each in arranged)])

    layout = hub_layout.changed(remaining, Reverted(tuple(arranged), new_names))
    is_changed = layout.rule is not None or surplus
    count = counted(len(matches), "name")
    rule = f"{table.framework} names as the model has them ({count})" if is_changed else None
    return HubLayout(layout.weights, layout.sources, rule)


def _grouped(
    names: Sequence[str], matches: Mapping[str, TemplateMatch]
) -> tuple[list[_Group], dict[str, str]]:
    """The names that are cut or joined, and the new names of all others."""
    groups: dict[tuple[str, ...], _Group] = {}
    new_names: dict[str, str] = {}
    for name in names:
        match = matches.get(name)
        if match is None:
            new_names[name] = name
            continue

        targets = tuple(framework_tables.filled(t, match.binding) for t in match.rule.targets)
        if match.rule.operation is None:
            new_names[name] = targets[0]
            continue
        group = groups.setdefault(targets, _Group(match.rule, targets))
        if match.source in group.members:
            raise NotArrangedError(f"{group.members[match.source]} and {name} are both for one")
        group.members[match.source] = name

    return list(groups.values()), new_names


def _require_layers(matches: Mapping[str, TemplateMatch], config: Config) -> None:
    """Raises unless the blocks are as many as config.json says."""
    layers = {int(match.binding["layer"]) for match in matches.values() if "layer" in match.binding}
    stated = look_up(config, "num_hidden_layers")
    if layers and type(stated) is int and (len(layers) != stated or max(layers) >= stated):
        raise NotArrangedError(
            f"there are blocks for {counted(len(layers), 'layer')}, and config.json has {stated}"
        )


def _arranged(group: _Group, weights: Weights, config: Config) -> list[Arranged]:
    """The tensors that a group becomes."""
    operation = _OPERATIONS[group.rule.operation or ""]
    lacking = [source for source in group.rule.sources if source not in group.members]
    names = [group.members[source] for source in group.rule.sources if source in group.members]
    for name in names:
        if name not in weights.tensors or name in weights.packed:
            raise NotArrangedError(f"{name} cannot be cut or joined")
    if lacking:
        raise NotArrangedError(f"{names[0]} is there without {lacking[0]}")

    tensors = [weights.tensors[name] for name in names]
    copies = [
        weights.copies[name].view(*tensor.shape)
        for name, tensor in zip(names, tensors, strict=True)
        if name in weights.copies
    ]

    results = _operated(operation, tensors, config, names[0])
    result_copies: Sequence[TensorRef | None] = [None] * len(results)
    if len(copies) == len(tensors):
        result_copies = _operated(operation, copies, config, names[0])

    members = zip(group.targets, results, result_copies, strict=True)
    return [Arranged.of(target, tensor, tuple(names), copy) for target, tensor, copy in members]


def _operated(
    operation: Operation, tensors: Sequence[TensorRef], config: Config, name: str
) -> list[TensorRef]:
    """What an operation makes of tensors;
    ``NotArrangedError`` where their shapes do not fit."""
    try:
        return operation(tensors, config)
    except (ValueError, IndexError) as error:
        raise NotArrangedError(f"{name}: {error}") from error


def _join_rows(tensors: Sequence[TensorRef], _: Config) -> list[TensorRef]:
    """The gates and inputs of stacked experts as one, expert by expert."""
    first, second = tensors
    if (first.shape, first.dtype) != (second.shape, second.dtype) or len(first.shape) != 3:
        raise ValueError("these are no two stacks of one shape")
    experts, rows, columns = first.shape
    placements = [((0, 0, 0), first), ((0, rows, 0), second)]
    return [TensorRef.tile((experts, 2 * rows, columns), placements)]


def _halve_rows(tensors: Sequence[TensorRef], _: Config) -> list[TensorRef]:
    """The gates and the inputs of an MLP, which are the halves of one tensor."""
    (tensor,) = tensors
    if tensor.shape[0] % 2:
        raise ValueError(f"{tensor.shape[0]} rows are no two halves")
    half = tensor.shape[0] // 2
    views = [View.of(tensor).narrow(0, start, half) for start in (0, half)]
    return [view.tensor(*view.shape) for view in views]


def _split_groups(tensors: Sequence[TensorRef], config: Config) -> list[TensorRef]:
    """Queries, keys and values:
    each group of heads has its queries, one key and one value."""
    (tensor,) = tensors
    heads = _number(config, "num_attention_heads")
    groups = _number(config, "num_key_value_heads", heads)
    row_count, rows_of_head = tensor.shape[0], divmod(tensor.shape[0], heads + 2 * groups)
    if heads % groups or rows_of_head[1]:
        raise ValueError(f"{row_count} rows are not those of {heads} heads in {groups} groups")

    head = rows_of_head[0]
    queries = heads // groups * head
    view = View.of(tensor).split(0, groups, queries + 2 * head)
    parts = [
        (0, queries, heads * head),
        (queries, head, groups * head),
        (queries + head, head, groups * head),
    ]
    return [
        view.narrow(1, start, length).tensor(rows, *tensor.shape[1:])
        for start, length, rows in parts
    ]


def _number(config: Config, key: str, default: int | None = None) -> int:
    number = look_up(config, key)
    number = default if number is None else number
    if type(number) is not int or number < 1:
        raise NotArrangedError(f"{key} of config.json is {number!r}, expected a number")
    return number


_OPERATIONS: dict[str, Operation] = {
    "join_rows": _join_rows,
    "halve_rows": _halve_rows,
    "split_groups": _split_groups,
}
