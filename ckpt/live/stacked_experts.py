"""The parts of AutoEP's experts under the names that the model has in transformers.

    AutoEP         experts.w1 (4, 3, 8)              a stack of 4 experts, of which a rank has 2
                   experts.w3 (4, 3, 8)
    transformers   experts.gate_up_proj (4, 6, 8)    of each expert w1, then w3

So each of both stacks is boxes of the model's tensor. Which names become which is in the
tables that ``ckpt to-fp32 --names hf`` goes by (``ckpt.weights.layouts``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt.engine.splitting.part import ModelPart, PartBox
from ckpt.engine.splitting.split_tensors import has_stacked_experts
from ckpt.engine.splitting.whole import TiedName
from ckpt.weights.layouts import framework_tables
from ckpt.weights.layouts.framework_tables import NameTable, TemplateMatch
from converters.errors import CheckpointError

FRAMEWORK = "AutoEP"
_JOINED = "join_rows"  # the rule of the tables for gates and inputs


def of_model(
    module: Any,
    config: Mapping[str, Any],
    parts: Mapping[str, ModelPart],
    ties: Sequence[TiedName],
) -> tuple[dict[str, ModelPart], list[TiedName]]:
    """The parts, by this rank's own names, and the tied names, as the model has them.

    ``config`` is what its config.json has.

    As they are where AutoEP has stacked no experts. ``CheckpointError`` where no table
    has this type of model, whose class would not load AutoEP's names.
    """
    if not has_stacked_experts(module):
        return dict(parts), list(ties)

    model_type = config.get("model_type")
    table = next((each for each in framework_tables.tables() if _is_for(each, model_type)), None)
    if table is None:
        raise CheckpointError(
            f"AutoEP has made names for the experts of {type(module).__name__} that it would not "
            f"load, and ckpt does not know those of model_type {model_type!r}; pass weights=None "
            "to a saver; live.fp32_state_dict gives the tensors under AutoEP's names",
            "unsupported",
        )

    names = [*(part.name for part in parts.values()), *(tie.name for tie in ties)]
    matches = framework_tables.matches_of(table, names)
    new_parts = {}
    for name, part in parts.items():
        renamed_part = _renamed(part, matches.get(part.name))
        if renamed_part is not None:
            new_parts[name] = renamed_part

    new_names = {
        part.name: new_parts[name].name for name, part in parts.items() if name in new_parts
    }
    new_ties = [
        tie._replace(name=_new_name(tie.name, matches), owner=new_names[tie.owner])
        for tie in ties
        if _new_name(tie.name, matches)
    ]
    return new_parts, new_ties


def _is_for(table: NameTable, model_type: object) -> bool:
    return table.framework == FRAMEWORK and model_type in table.model_types


def _new_name(name: str, matches: Mapping[str, TemplateMatch]) -> str:
    """The model's name for one of AutoEP's; empty where the model has no such tensor."""
    match = matches.get(name)
    if match is None:
        return name
    targets = match.rule.targets
    return framework_tables.filled(targets[0], match.binding) if targets else ""


def _renamed(part: ModelPart, match: TemplateMatch | None) -> ModelPart | None:
    """A part as one of the model's tensor;
    ``None`` for a buffer that the model does not have."""
    if match is None:
        return part
    new_name = _new_name(part.name, {part.name: match})
    if not new_name and part.is_buffer:
        return None
    if not new_name:
        raise CheckpointError(
            f"{part.name} is a parameter, which the model does not have; pass weights=None",
            "unsupported",
        )
    if match.rule.operation != _JOINED:
        return replace(part, name=new_name)

    experts, rows, *inner_shape = part.shape
    sources = match.rule.sources
    first_row = rows * sources.index(match.source)
    return replace(
        part,
        name=new_name,
        shape=(experts, rows * len(sources), *inner_shape),
        boxes=tuple(_moved(box, first_row) for box in part.boxes),
    )


def _moved(box: PartBox, rows: int) -> PartBox:
    """A box of a stack, so many rows further on in each expert of the model's tensor."""
    expert, row, *inner_offsets = box.offsets
    return box._replace(offsets=(expert, row + rows, *inner_offsets))
