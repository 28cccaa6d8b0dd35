"""Which source says how a parameter is cut:
the user's rules, the affine map, the patterns.

Where none does nothing is guessed. The refusal lists the parameters with the shapes of
their shards, as a template of the file that ``--tp-rules`` takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.options import TP_RULES
from converters.zero.files import typed
from converters.zero.files.state_files import State
from converters.zero.parallel import affine_map, cuts, patterns, shipped_rules
from converters.zero.parallel.cuts import Cut, Shapes
from converters.zero.parallel.rules import Rules

INFO = "universal_checkpoint_info"
MAX_LISTED = 24  # parameters in a template


class UnknownCutsError(CheckpointError):
    """The error for parameters of which nothing says how they were cut."""


@dataclass(slots=True)
class CutTable:
    """The cuts of a checkpoint's parameters.

    ``info`` is what the model file records, ``entries`` its affine map by pattern, and
    ``buffers`` are names that every rank has whole, whatever the patterns say.
    ``whole_names`` are never cut, whatever the user's rules say, too.
    """

    model: State
    rank_count: int
    info: Mapping[str, Any]
    entries: Mapping[str, Any]
    rules: Rules | None
    buffers: frozenset[str] = frozenset()
    whole_names: frozenset[str] = frozenset()
    unknown: dict[str, Shapes] = field(default_factory=dict)

    @staticmethod
    def of(models: Sequence[State], rules: Rules | None) -> CutTable:
        """The table of a checkpoint, by the model files of its tensor-parallel ranks.

        ``CheckpointError`` where these say different things of how parameters are cut.
        """
        model, *further_models = models
        fields = _recorded(model)
        for further_model in further_models:
            if not typed.are_alike(_of_cuts(fields), _of_cuts(_recorded(further_model))):
                raise further_model.fail(
                    f"its {INFO} does not cut parameters as that of {model.path.name} does; files "
                    "of two saves are mixed"
                )

        entries = affine_map.params(fields, str(model.path))
        return CutTable(model, len(models), fields, entries, rules)

    def cut_of(self, name: str, shapes: Shapes) -> Cut | None:
        """The cut of a parameter or buffer with shards of these shapes.

        ``None``, and noted for ``require_known``, where nothing says how it is cut.
        ``CheckpointError`` if what is recorded does not fit the shards.
        """
        is_whole = name in self.whole_names
        by_rule = self.rules.cut_of(name, shapes) if self.rules and not is_whole else None
        if by_rule is not None:
            return by_rule

        try:
            if is_whole or name in self.buffers:
                return cuts.replicated(shapes)
            recorded = self.entry_of(name)
            if recorded is not None:
                return affine_map.cut_from(recorded, self.rank_count)
            if patterns.are_there(self.info):
                return patterns.cut_of(self.info, name, shapes)
        except MalformedError as error:
            raise self.fail(name, error) from error

        self.unknown[name] = shapes
        return None

    def fail(self, name: str, error: MalformedError) -> CheckpointError:
        """The error for a cut that does not fit; the caller raises it."""
        return CheckpointError(
            f"{self.model.path}: how {name} is cut for tensor parallelism cannot be told: "
            f"{error}; {TP_RULES('FILE')} says it",
            "unsupported",
        )

    def entry_of(self, name: str) -> Any:
        """The entry of the affine map on a parameter; ``None`` if it has none."""
        literal = key_of(name)
        if literal in self.entries:
            return self.entries[literal]

        fitting = [
            pattern
            for pattern in self.entries
            if isinstance(pattern, str)
            and not _is_literal(pattern)
            and patterns.begins(pattern, name)
        ]
        if len(fitting) > 1:
            raise MalformedError(f"{len(fitting)} entries of the affine map fit it")
        return self.entries[fitting[0]] if fitting else None

    def require_known(self) -> None:
        """``UnknownCutsError``, with a template of rules, if a parameter has no cut."""
        if not self.unknown:
            return

        texts = {name: f"shards: {_described(shapes)}" for name, shapes in self.unknown.items()}
        advice = template(texts, self.rules)
        raise UnknownCutsError(
            f"{self.model.path} is of {self.rank_count} tensor-parallel ranks, and nothing in it "
            f"says how {len(self.unknown):,} of its parameters were cut; {advice}",
            "unsupported",
        )


def _recorded(model: State) -> Mapping[str, Any]:
    """What a model file records of tensor parallelism."""
    info = model.root.get(INFO)
    return info if isinstance(info, dict) else {}


def _of_cuts(info: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say how parameters are cut, which all ranks write alike."""
    return {key: info[key] for key in (*patterns.KEYS, affine_map.KEY) if key in info}


def template(texts: Mapping[str, str], rules: Rules | None) -> str:
    """The advice for parameters without a cut: a file of rules, with its beginning, or
    with what ``rules``, those that were given, lack.

    ``texts`` says of each parameter what its shapes are.
    """
    templates = {f"'{_pattern(name)}' = \"?\" # {text}": None for name, text in texts.items()}
    lines = list(templates)[:MAX_LISTED]
    remainder = len(templates) - len(lines)
    more = f"; and {remainder:,} more" if remainder else ""
    return f"{_advice(rules)}: {'; '.join(lines)}{more}"


def _advice(rules: Rules | None) -> str:
    """Where to write the rules that are missing, and of which form they are."""
    forms = (
        "a rule for each, which may be a pattern (replicated, dim 0, dim 1, average, or "
        "{ dim = 0, parts = N })"
    )
    option = TP_RULES("FILE")
    if rules is None:
        return (
            f"write a file with {forms}, and give it with {option}, or name one of those that are "
            f"shipped ({', '.join(shipped_rules.RULES)})"
        )
    if (name := rules.shipped_name) is None:
        return f"{rules.path} has no rule for them; add {forms}"
    return (
        f"the rules of {name} leave them open; write a file that begins with extends = "
        f'"{name}", with {forms}, and give it with {option}'
    )


def key_of(name: str) -> str:
    """The pattern of a single parameter, as DeepSpeed writes it into its maps."""
    return f"^{re.escape(name)}$"


def _pattern(name: str) -> str:
    """A pattern of a parameter that fits those of all layers."""
    pieces = [r"\d+" if piece.isdigit() else re.escape(piece) for piece in name.split(".")]
    return r"\.".join(pieces)


def _is_literal(pattern: str) -> bool:
    """Whether an anchored pattern is a name with its special characters escaped."""
    inner = pattern[1:-1]
    is_anchored = pattern.startswith("^") and pattern.endswith("$")
    return is_anchored and re.escape(inner.replace("\\", "")) == inner


def _described(shapes: Shapes) -> str:
    """The shapes of the shards, once where all ranks have the same."""
    texts = ["none" if shape is None else words.shape(shape) for shape in shapes]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
