"""The optimizer's state of a lane by the names of its shards.

Under ZeRO, and in 16 bits without it, the state lies as the fp32 weights do. In fp32
without ZeRO torch's own state is saved, by number: in the order in which the optimizer
was given the parameters. It is given names where there is one param group, and every
shape is that of the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.zero import optimizer_state
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.typed import Section
from converters.zero.model_ranks import numbered_states
from converters.zero.model_ranks.numbered_states import NumberedStates

IN_ORDER = (
    "the optimizer's state of a training in fp32 without ZeRO has numbers, not names; it is named "
    "in the order of the model, which all shapes bear out"
)


def with_states(lane: Checkpoint) -> Checkpoint:
    """The lane with its optimizer's state by name,
    and a note on what was taken for granted."""
    optimizer = lane.model.root.get("optimizer")
    if lane.ranks or not isinstance(optimizer, dict) or "param_groups" not in optimizer:
        return replace(lane, optimizer=partial(optimizer_state.read, lane))

    by_name = in_order(lane)
    note = f"the optimizer's state is absent: {numbered_states.UNKNOWN}"
    states = NumberedStates(lane.place.folder, by_name, lane.weights.aliases)
    notes = (*lane.notes, note if by_name is None else IN_ORDER)
    return replace(lane, optimizer=states.of, notes=notes)


def in_order(lane: Checkpoint) -> dict[str, Mapping[Any, Any]] | None:
    """The states of torch's optimizer by name; ``None`` if their order is not shown."""
    optimizer = Section(lane.model.path, "", lane.model.root).section("optimizer")
    groups = [group for group in optimizer.dicts("param_groups") if group.get("params")]
    if len(groups) != 1:
        return None

    parameters = {
        name: ref for name, ref in lane.weights.tensors.items() if name not in lane.weights.buffers
    }
    states = numbered_states.of_group(optimizer, groups[0])
    return numbered_states.in_order(
        states, list(parameters), [ref.shape for ref in parameters.values()]
    )
