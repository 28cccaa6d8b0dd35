"""Cuts out of a file of the user's, for checkpoints that do not say how they were cut.

    extends = "llama"                            one of ``shipped_rules``, if any
    [rules]                                      patterns are regular expressions, which have to
    '.*layernorm\\..*' = "replicated"             match a whole name; the first one that does says
    '.*dense\\.weight' = "dim 1"                  how the parameter is cut
    '.*query_key_value\\..*' = { dim = 0, parts = 3 }
    '.*gate_up\\..*' = { dim = 0, parts = [24, 24] }

TOML, or JSON with the same content; ``[rules]`` may be left out. ``average`` takes the mean of the
ranks' values, ``parts`` are sub-parameters that were cut one by one: how many equal ones, or their
sizes in the whole parameter. Some files are shipped (``shipped_rules``), and go by their names; a
file that ``extends`` one of these says what it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError, MalformedError
from converters.lazy_pattern import LazyPattern
from converters.peft import patterns as expressions
from converters.storage import settings_file, stores
from converters.storage.store import Name
from converters.storage.stores import source_path
from converters.zero.files import state_files
from converters.zero.parallel import cuts, degrees, shipped_rules
from converters.zero.parallel.cuts import Cut, Shape, Shapes
from converters.zero.parallel.degrees import SubParameters

_NAMES = ", ".join(shipped_rules.RULES)
_ON_AXIS = LazyPattern(r"dim (\d{1,2})")


@dataclass(frozen=True, slots=True)
class Rules:
    """How parameters are cut, by pattern, as the file ``path`` has it."""

    path: Path
    values: Mapping[str, Any]

    @property
    def shipped_name(self) -> str | None:
        """The name of the rules that are shipped, if they are these and nothing else."""
        names = (name for name, values in shipped_rules.RULES.items() if values is self.values)
        return next(names, None)

    def cut_of(self, name: str, shapes: Shapes) -> Cut | None:
        """The cut of a parameter; ``None`` if no pattern fits its name."""
        for pattern, rule in self.values.items():
            if expressions.matches(pattern, name):
                try:
                    return _cut_by(rule, shapes)
                except MalformedError as error:
                    raise CheckpointError(
                        f"{self.path}: the rule {pattern!r} does not fit {name}: {error}",
                        "refused",
                    ) from error

        return None

    def cut_whole(self, name: str, shape: Shape, rank_count: int) -> Cut | None:
        """The cut of a whole parameter for so many ranks; ``None`` if no pattern fits."""
        for pattern, rule in self.values.items():
            if not expressions.matches(pattern, name):
                continue
            try:
                return _cut_whole(rule, shape, rank_count)
            except MalformedError as error:
                raise CheckpointError(
                    f"{self.path}: the rule {pattern!r} does not cut {name} for {rank_count} "
                    f"ranks: {error}",
                    "refused",
                ) from error

        return None


def read(path: Name) -> Rules:
    """The rules of a file, or those that are shipped under a name.

    ``CheckpointError`` for what is neither.
    """
    location = source_path(path)
    values = shipped_rules.RULES.get(str(path))
    if values is not None and not stores.exists(location):
        return Rules(location, values)

    content = settings_file.read(location, f"pattern = rule, or one of {_NAMES}")
    base = content.pop("extends", None)
    if base is not None and base not in shipped_rules.RULES:
        raise CheckpointError(
            f"{location} extends {state_files.shown(base)}; expected one of {_NAMES}", "refused"
        )
    rules = content.get("rules", content)
    if not isinstance(rules, dict) or not (rules or base):
        raise CheckpointError(f"{location} has no rules: expected pattern = rule", "refused")

    for pattern, rule in rules.items():
        expressions.matches(pattern, "")
        _require_rule(location, pattern, rule)
    shipped = shipped_rules.RULES[base] if base else {}
    return Rules(location, rules | {key: shipped[key] for key in shipped if key not in rules})


def _require_rule(path: Path, pattern: str, rule: Any) -> None:
    """``CheckpointError`` unless a rule is one of those that there are."""
    if isinstance(rule, str) and (rule in ("replicated", "average") or _ON_AXIS.fullmatch(rule)):
        return

    if isinstance(rule, dict) and rule.keys() == {"dim", "parts"}:
        parts = rule["parts"]
        sizes = parts if isinstance(parts, list) else [parts]
        if is_whole_number(rule["dim"]) and sizes and all(is_whole_number(s, 1) for s in sizes):
            return

    raise CheckpointError(
        f"{path}: the rule of {pattern!r} is {state_files.shown(rule)}; expected "
        '"replicated", "average", "dim N", or { dim = N, parts = ... } with a number of equal '
        "parts or a list of their sizes",
        "refused",
    )


def _cut_by(rule: Any, shapes: Shapes) -> Cut:
    """The cut that a rule makes of shards of these shapes."""
    if rule == "replicated":
        return cuts.replicated(shapes)
    if rule == "average":
        return cuts.averaged(shapes)
    if isinstance(rule, str):
        return cuts.along(int(rule.removeprefix("dim ")), shapes)

    axis, parts = rule["dim"], rule["parts"]
    if not isinstance(parts, list):
        return cuts.equal_parts(axis, parts, shapes)

    uneven = [size for size in parts if size % len(shapes)]
    if uneven:
        raise MalformedError(f"{uneven[0]} elements are not cut evenly for {len(shapes)} ranks")
    return cuts.in_parts(axis, [[size // len(shapes)] * len(shapes) for size in parts], shapes)


def _cut_whole(rule: Any, shape: Shape, rank_count: int) -> Cut:
    """The cut that a rule makes of a parameter of this shape."""
    if rule == "replicated":
        return cuts.replicated([shape] * rank_count)
    if rule == "average":
        raise MalformedError("ranks that have values of their own are not made of one tensor")

    axis = int(rule.removeprefix("dim ")) if isinstance(rule, str) else rule["dim"]
    if axis >= len(shape):
        raise MalformedError(f"it is {words.shape(shape)}, and has no axis {axis}")

    sizes = [shape[axis]] if isinstance(rule, str) else rule["parts"]
    if not isinstance(sizes, list):
        width, remainder = divmod(shape[axis], sizes)
        sizes = [width] * sizes if not remainder else []
    if sum(sizes) != shape[axis]:
        raise MalformedError(f"{shape[axis]} elements on axis {axis} are not those of its parts")
    return degrees.evenly(shape, SubParameters(axis, tuple(sizes)), rank_count)


_current: ContextVar[Rules | None] = ContextVar("rules", default=None)


@contextmanager
def using(path: Name | None) -> Iterator[None]:
    """Checkpoints that are read in this block are cut by the rules of a file,
    if one is named."""
    token = _current.set(None if path is None else read(path))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Rules | None:
    """The rules of the block that this is in."""
    return _current.get()
