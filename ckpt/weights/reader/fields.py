"""Which names a class has, and how large its tensors are, by fields of config.json.

``architecture_fields.jsonl`` is made by ``scripts/tables/make_architecture_fields.py``,
which says what it holds. Where it does not know a class, nothing is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.weights.reader import entries
from ckpt.weights.reader.lengths import look_up
from converters.lazy_pattern import LazyPattern
from converters.tensors import Weights

FILE = Path(__file__).parent.parent / "architecture_fields.jsonl"
DERIVED = ("is_decoder",)  # transformers sets it by other fields
_LAYER = LazyPattern(r"\.layers\.(\d{1,6})\.(?:mlp|feed_forward)\.(.+)$")
# of layers with experts
_ROUTED = (
    "experts.",
    "gate.weight",
    "router.",
    "shared_expert",
)
_DENSE = ("gate_proj.", "up_proj.", "down_proj.")

NamesLike = Callable[[str, Collection[str]], list[str]]


class Disagreement(NamedTuple):
    """Names that a field of config.json rules out, or wants."""

    path: str
    value: Any
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"config.json says {self.path} {json.dumps(self.value)}"


class Size(NamedTuple):
    """A dimension of a tensor that is not as long as a field of config.json says."""

    path: str
    value: int
    name: str
    length: int

    def __str__(self) -> str:
        return f"config.json says {self.path} {self.value:,}, and {self.name} has {self.length:,}"


@dataclass(frozen=True, slots=True)
class Fields:
    """The consequences of one class's fields; ``ties`` is ``None`` where it is unknown."""

    ties: bool | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def stated(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration with each field under its own name."""
        content = dict(config)
        for alias, own_path in self.other_names.items():
            *parts, last = own_path.split(".")
            place: Any = content
            for part in parts:
                inner = place.get(part)
                place[part] = place = dict(inner) if isinstance(inner, dict) else {}

            value = look_up(config, alias)
            if value is not None and place.get(last) is None:
                place[last] = value

        return content

    def disagreements(
        self,
        names: Iterable[str],
        config: Mapping[str, Any],
        names_like: NamesLike,
    ) -> tuple[Disagreement, ...]:
        """The fields that rule out names that are there, or want names that are not.

        ``names_like`` returns the names that the class may have of a form, which is one
        of several.
        """
        config = self.stated(config)
        by_form: dict[str, list[str]] = {}
        for name in names:
            by_form.setdefault(form(name), []).append(name)
        all_names = [name for each in by_form.values() for name in each]
        states = list(self._states(config))
        ruled_out = _ruled_out(states, by_form)
        required = _required(states, by_form, names_like)

        return (*ruled_out, *required, *_experts(all_names, config))

    def _states(self, config: Mapping[str, Any]) -> Iterator[FieldState]:
        for path, (default, present, absent) in self.switches.items():
            if path.rpartition(".")[2] in DERIVED:
                continue
            value = _value(path, default, config)
            sides = (present, absent) if value else (absent, present)
            yield FieldState(path, value, bool(value) == bool(default), *sides)

    def mismatched_size(self, weights: Weights, config: Mapping[str, Any]) -> Size | None:
        """The first field whose value is the length of no tensor that it should size."""
        config = self.stated(config)
        sized_forms = {each for _, places in self.sizes.values() for each, _ in places}
        by_form = {f: name for name in weights.tensors if (f := form(name)) in sized_forms}
        for path, (default, places) in self.sizes.items():
            stated_value = look_up(config, path)
            value = default if stated_value is None else stated_value
            if type(value) is not int:
                continue

            lengths = [
                (name, weights.tensors[name].shape[place])
                for each, place in places
                if (name := by_form.get(each)) is not None
                and name not in weights.packed
                and place < len(weights.tensors[name].shape)
                and weights.tensors[name].numel
            ]
            if lengths and all(length != value for _, length in lengths):
                return Size(path, value, *lengths[0])

        return None


class FieldState(NamedTuple):
    """One field's value here, with the forms of names that it brings and rules out."""

    path: str
    value: Any
    usual: bool
    present_forms: Sequence[str]
    absent_forms: Sequence[str]


def _value(path: str, default: Any, config: Mapping[str, Any]) -> Any:
    """A field's value; T5's ``is_gated_act`` follows from another if it is unstated.

    transformers 5.23 and 4.57: configuration_t5.py.
    """
    *parts, last = path.split(".")
    place = look_up(config, ".".join(parts)) if parts else config
    if not isinstance(place, Mapping):
        return default
    if last in place:
        return place[last]

    kind = place.get("feed_forward_proj")
    if last == "is_gated_act" and isinstance(kind, str):
        return kind.startswith("gated-")

    return default


def _deciding(states: Iterable[FieldState]) -> dict[str, tuple[bool, FieldState]]:
    """Whether each form of names is there, and the field that decides.

    Fields with an unusual value come first: each of them alone removes names that are
    usually there, or brings names that are not. What two of them do to one module is
    only known for biases.
    """
    ordered = sorted(states, key=lambda each: each.usual)
    fields_by_module = dict[
        str, dict[str, None]
    ]()  # modules -> fields unlike usual that change what is in them
    for state in ordered:
        for each in (*state.present_forms, *state.absent_forms) if not state.usual else ():
            fields_by_module.setdefault(_module(each), {})[state.path] = None

    decisions: dict[str, tuple[bool, FieldState]] = {}
    for state in ordered:
        for forms, is_there in (
            (state.present_forms, True),
            (state.absent_forms, False),
        ):
            for each in forms:
                if _only_biases(state.path, fields_by_module.get(_module(each), ())):
                    decisions.setdefault(each, (is_there, state))

    return decisions


def _module(form: str) -> str:
    """The module that a parameter's own module lies in."""
    return ".".join(form.split(".")[:-2])


def _only_biases(path: str, others: Iterable[str]) -> bool:
    """Whether a field decides alone, or all are about biases."""
    return all(each == path or ("bias" in each and "bias" in path) for each in others)


def _ruled_out(
    states: Sequence[FieldState], by_form: Mapping[str, list[str]]
) -> Iterator[Disagreement]:
    deciding = _deciding(states)
    for state in states:
        forms = [
            form_name
            for form_name in state.absent_forms
            if form_name in by_form and deciding.get(form_name) == (False, state)
        ]
        if forms:
            names = [name for each in forms for name in by_form[each]]
            yield Disagreement(state.path, state.value, unexpected=tuple(names))


def _required(
    states: Sequence[FieldState],
    by_form: Mapping[str, list[str]],
    names_like: NamesLike,
) -> Iterator[Disagreement]:
    """Only where no other field may be why a name is not there."""
    deciding = _deciding(states)
    changed = [state.path for state in states if not state.usual]
    for state in states:
        if not _only_biases(state.path, changed):
            continue

        forms = [each for each in state.present_forms if deciding.get(each) == (True, state)]
        if any(each in by_form for each in forms):
            continue

        names = tuple(name for each in forms for name in names_like(each, forms))
        if names:
            yield Disagreement(state.path, state.value, missing=names)


def _experts(names: Collection[str], config: Mapping[str, Any]) -> Iterator[Disagreement]:
    """Layers that config.json gives experts and that have none, or the reverse."""
    path, sparse = _sparse_layers(config)
    if path is None:
        return

    routed, dense = dict[int, list[str]](), dict[int, list[str]]()
    for name in names:
        match = _LAYER.search(name)
        if match is None:
            continue
        number, ending = int(match[1]), match[2]
        for starts, group in ((_ROUTED, routed), (_DENSE, dense)):
            if ending.startswith(starts):
                group.setdefault(number, []).append(name)

    if not routed:
        return

    dense_only = {number: group for number, group in dense.items() if number not in routed}
    wrong_names = [
        name
        for groups, has_experts in ((routed, True), (dense_only, False))
        for number, group in groups.items()
        if bool(sparse(number)) != has_experts
        for name in group
    ]
    if wrong_names:
        yield Disagreement(path, look_up(config, path), unexpected=tuple(wrong_names))


def _sparse_layers(config: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The field that says which layers have experts, and a test for one layer.

    transformers 5.23: modeling_deepseek_v3.py, modeling_qwen3_moe.py,
    modeling_llama4.py, modeling_ernie4_5_moe.py.
    """
    first, dense_layers, every = map(
        config.get, ("first_k_dense_replace", "mlp_only_layers", "moe_layers")
    )
    if config.get("mlp_layer_types") is not None:
        return None, None
    if isinstance(every, list):
        return "moe_layers", lambda number: number in every
    if config.get("moe_layer_freq") in (None, 1) and type(first) is int:
        return "first_k_dense_replace", lambda number: number >= first

    step = config.get("decoder_sparse_step", 1)
    if isinstance(dense_layers, list) and type(step) is int and step > 0:
        return "mlp_only_layers", lambda n: n not in dense_layers and (n + 1) % step == 0

    start, end, step = map(
        config.get,
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    )
    if type(start) is type(end) is type(step) is int and start >= 0 and step > 0:
        last = end if end >= 0 else math.inf
        return (
            "moe_layer_start_index",
            lambda n: (n + 1) % step == 0 and start <= n <= last,
        )

    return None, None


def form(name: str) -> str:
    """A name with ``*`` for each number."""
    if not any(map(str.isdigit, name)):
        return name
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@cache
def fields_of(name: str) -> Fields:
    """The known consequences of the fields of a class."""
    entry = _file()["classes"].get(name)
    if entry is None:
        return Fields()

    facts = {key: _file()["facts"][number] for key, number in entry.items()}
    switches = {
        path: (default, spread(present), spread(absent))
        for path, (default, present, absent) in facts.pop("switches", {}).items()
    }

    return Fields(**facts, switches=switches)


def spread(groups: Mapping[str, str]) -> list[str]:
    """Full names, from a table with the ends of the names in each module."""
    return [
        f"{module}.{end}" if module else end
        for module, ends in groups.items()
        for end in ends.split(" ")
    ]


@cache
def _file() -> Any:
    return entries.read(FILE, "facts")
