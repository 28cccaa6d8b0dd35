"""The states of an optimizer without ZeRO, by the numbers that torch gives parameters.

torch's ``state_dict`` has ``state`` by number and ``param_groups`` with the numbers of
each group's parameters, in the order in which the optimizer was given them. Names are in
neither (torch 2.13 ``optim/optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape
from converters.zero.files.typed import Section

Value = TensorRef | int | float
State = Mapping[Any, Any]  # of a parameter
UNKNOWN = (
    "the optimizer's state of a training in fp32 without ZeRO has numbers, not names, and the "
    "shapes leave open which parameters these are"
)


@dataclass(frozen=True, slots=True)
class NumberedStates:
    """The states of optimizers, by the names of parameters where these are known.

    ``by_name`` is ``None`` where they are not. ``aliases`` maps tied names to these.
    ``folder`` is what messages begin with.
    """

    folder: Path
    by_name: Mapping[str, State] | None
    aliases: Mapping[str, str]

    def of(self, name: str) -> dict[str, Value]:
        """The state of a parameter: tensors of its shape, and numbers.

        ``KeyError`` if it is not trained, ``CheckpointError`` if its state is not known.
        """
        if self.by_name is None:
            raise CheckpointError(f"{self.folder}: {UNKNOWN}", "unsupported")

        owner = self.aliases.get(name, name)
        if owner not in self.by_name:
            raise KeyError(f"{name} is not trained: the optimizer keeps nothing for it")

        values: dict[str, Value] = {}
        for key, value in self.by_name[owner].items():
            if key == "step":
                value = number(value)
            if isinstance(value, (TensorRef, int, float)):
                values[key] = value

        return values


def number(value: Any) -> Any:
    """The value of a number that may be a tensor; others stay as they are."""
    is_scalar = isinstance(value, TensorRef) and value.shape == ()
    return state_files.scalar(value) if is_scalar else value


def of_group(optimizer: Section, group: Mapping[Any, Any]) -> list[State]:
    """The states of a group's parameters, in its order."""
    states = optimizer.section("state")
    numbers = Section(optimizer.path, "param_groups", group).numbers("params")
    return [states.state(number) for number in numbers]


def shape_of(state: State) -> Shape | None:
    """The shape that all tensors of a state have;
    ``None`` if they tell none, or several."""
    shapes = {
        value.shape
        for key, value in state.items()
        if isinstance(value, TensorRef) and key != "step"
    }
    return shapes.pop() if len(shapes) == 1 else None


def in_order(
    states: Sequence[State], names: Sequence[str], shapes: Sequence[Shape]
) -> dict[str, State] | None:
    """The states by these names; ``None`` unless every one has the shape of its name."""
    if len(states) != len(names) or [shape_of(state) for state in states] != list(shapes):
        return None
    return dict(zip(names, states, strict=True))
