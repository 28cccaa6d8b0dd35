"""Weights in the layout of the Hub:
the names and shapes that ``save_pretrained`` writes.

    memory   model.layers.0.mlp.experts.gate_up_proj           8 x 28672 x 4096
    Hub      model.layers.0.block_sparse_moe.experts.0.w1.weight      14336 x 4096
             model.layers.0.block_sparse_moe.experts.0.w3.weight      14336 x 4096
             ...

transformers 4, vLLM and llama.cpp read the layout of the Hub alone. transformers 5 reads
both. Names that are those of a file already stay as they are, and so do names of which
that cannot be told (``evidence``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckpt.weights.layouts import table
from converters.tensors import Weights
from converters.words import counted

if TYPE_CHECKING:
    from ckpt.weights.layouts.reverting import Arranged, Reverted


@dataclass(frozen=True, slots=True)
class HubLayout:
    """Weights in the layout of the Hub, or as they were where that is not known.

    ``sources`` has the names before by each new one: several where tensors were joined.
    ``rule`` says in a line what was changed, ``obstacle`` why nothing was, where the
    layout may be another one.
    """

    weights: Weights
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rule: str | None = None
    obstacle: str | None = None


def of(weights: Weights, config: Mapping[str, Any], architecture: str | None) -> HubLayout:
    """The weights in the layout of the Hub,
    for a class of transformers in a configuration."""
    if architecture is None:
        return HubLayout(weights, obstacle="config.json names no class of transformers")

    rules = table.rules_of(architecture, config)
    if rules is None:
        version = table.version()
        obstacle = (
            f"{architecture} is not in the table of layouts (transformers {version}), or not with "
            "these parts"
        )
        return HubLayout(weights, obstacle=obstacle)

    if not rules:
        return HubLayout(weights)

    # which most models need not
    from ckpt.weights.layouts import evidence, reverting
    from ckpt.weights.layouts.evidence import NameOrigin
    from ckpt.weights.layouts.operations import NotArrangedError

    names = every_name(weights)
    try:
        layout = changed(weights, reverting.reverted(weights, names, rules, config))
    except NotArrangedError as error:
        layout = HubLayout(weights, obstacle=str(error))
    if layout.rule is None and layout.obstacle is None:
        return layout

    origin = evidence.origin_of(names, config, architecture, rules)
    if origin is NameOrigin.FILE:
        return HubLayout(weights)
    if origin is NameOrigin.UNKNOWN:
        obstacle = (
            f"{architecture} has other names in memory than in its files, and these names do not "
            "tell which of both they are"
        )
        return HubLayout(weights, obstacle=obstacle)

    return layout


def every_name(weights: Weights) -> Collection[str]:
    """All names of weights, those that are tied or lost too."""
    return dict.fromkeys(
        (*weights.tensors, *weights.aliases, *weights.absent, *weights.lost_ties.values())
    )


def changed(weights: Weights, changes: Reverted) -> HubLayout:
    """The weights with these changes."""
    new_names = {old: new for old, new in changes.names.items() if old != new}
    if not new_names and not changes.arranged:
        return HubLayout(weights)

    names = changes.names
    origins: dict[str, tuple[str, ...]] = {new: (old,) for old, new in new_names.items()}
    origins |= {each.name: each.sources for each in changes.arranged}
    by_source = {name: each for each in reversed(changes.arranged) for name in each.sources}
    order = tuple(_order(weights, changes, by_source))
    tensors = {names[name]: ref for name, ref in weights.tensors.items() if name in names}
    copies = {names[name]: ref for name, ref in weights.copies.items() if name in names}
    tensors |= {each.name: each.tensor for each in changes.arranged}
    copies |= {each.name: each.copy for each in changes.arranged if each.copy is not None}

    def translated(old_names: frozenset[str]) -> frozenset[str]:
        results = (each for each in changes.arranged if old_names.issuperset(each.sources))
        others = (names[name] for name in old_names if name in names)
        return frozenset((*others, *(each.name for each in results)))

    layout = replace(
        weights,
        tensors={name: tensors[name] for name in order if name in tensors},
        aliases={names[alias]: names[owner] for alias, owner in weights.aliases.items()},
        absent={names[name]: reason for name, reason in weights.absent.items()},
        lost_ties={names[name]: names[owner] for name, owner in weights.lost_ties.items()},
        copies=copies,
        order=order if weights.order else (),
        buffers=translated(weights.buffers),
        frozen=translated(weights.frozen),
        packed=translated(weights.packed),
        trained=translated(weights.trained),
    )
    return HubLayout(layout, origins, _rule(len(new_names), changes.arranged))


def _order(weights: Weights, changes: Reverted, by_source: Mapping[str, Arranged]) -> Iterator[str]:
    """The new names where the old ones were;
    those of a group where its first tensor was."""
    by_sources: dict[tuple[str, ...], list[str]] = {}
    for each in changes.arranged:
        by_sources.setdefault(each.sources, []).append(each.name)

    old_names = weights.order or tuple(weights.tensors)
    for name in dict.fromkeys((*old_names, *weights.tensors)):
        if name in changes.names:
            yield changes.names[name]
        elif name in by_source:
            yield from by_sources.pop(by_source[name].sources, ())


def _rule(renamed: int, arranged: tuple[Arranged, ...]) -> str:
    """What was changed, in a line."""
    sources = {name for each in arranged for name in each.sources}
    parts = [f"{counted(renamed, 'name')} changed"] if renamed else []
    if arranged:
        parts.append(f"{counted(len(sources), 'tensor')} as {len(arranged)}")
    return f"layout of the Hub, transformers {table.version()} ({', '.join(parts)})"
