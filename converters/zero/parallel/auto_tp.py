"""How AutoTP cuts a parameter for any number of ranks: between key heads, where they are known.

    3 key heads, 2 ranks     q: 16 | 8     k: 8 | 4      what the heads divide
    elsewhere                gate: 13 | 13               as evenly as can be

So the cuts of another number of ranks follow from those that are saved, if the rule gives
these, too. Source: DeepSpeed 0.19.8 ``module_inject/tp_shard.py`` (``get_shard_size``), whose
``tp_grain_size`` is 1 where a training has not set another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from converters.zero.parallel import cuts, degrees
from converters.zero.parallel.cuts import Cut
from converters.zero.parallel.degrees import SubParameters

_HEADS = ("lm_head", "embed_out")  # of the model, which have no key heads
_MLP = ("mlp", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
Width = tuple[int, bool]  # elements of a sub-parameter on its axis, and whether heads may divide it


@dataclass(frozen=True, slots=True)
class HeadRule:
    """The rule for ``key_heads`` (``None``: the model counts none) and ``rank_count`` ranks.

    Without ``is_certain`` other numbers of heads cut in the same way, there and where it
    was saved.
    """

    key_heads: int | None
    rank_count: int
    is_certain: bool = True

    @property
    def known_heads(self) -> int | None:
        """The number of key heads, if it is certain and there are any."""
        return self.key_heads if self.is_certain else None

    def widths(self, width: Width) -> list[int]:
        """The elements of a sub-parameter that each rank has."""
        total, has_heads = width
        unit = 1
        if has_heads and self.key_heads is not None and total % self.key_heads == 0:
            unit = total // self.key_heads
        share, remainder = divmod(total // unit, self.rank_count)
        return [(share + (rank < remainder)) * unit for rank in range(self.rank_count)]

    def cut_of(self, name: str, layout: Cut) -> Cut | None:
        """A saved cut for these ranks; ``None`` where its pieces do not lie so."""
        parts = degrees.sub_parameters(layout)
        if parts is None:
            return None
        widths = [self.widths((total, _has_heads(name))) for total in parts.widths]
        shapes = [
            (*layout.shape[: parts.axis], sum(rank_widths), *layout.shape[parts.axis + 1 :])
            for rank_widths in zip(*widths, strict=True)
        ]
        new_layout = cuts.in_parts(parts.axis, widths, shapes)
        pieces = tuple(piece for piece in new_layout.pieces if 0 not in piece.sizes)
        return replace(new_layout, pieces=pieces)


def rule_for(
    layouts: Mapping[str, Cut], saved_count: int, rank_count: int, key_heads: int | None
) -> HeadRule | None:
    """The rule that ``layouts`` of ``saved_count`` ranks were cut by, for other ranks.

    ``key_heads`` are those that the model's configuration counts, if it is there; else all
    numbers are tried. ``None`` where no number gives the saved cuts, or several do that
    would cut otherwise for the new ranks.
    """
    saved = dict(_saved_widths(layouts, saved_count))
    counts = [key_heads] if key_heads is not None else _possible_heads(saved)
    fitting = [
        count
        for count in counts
        if all(
            HeadRule(count, saved_count).widths(width) == widths for width, widths in saved.items()
        )
    ]
    rules = {
        tuple(map(tuple, map(rule.widths, saved))): rule
        for rule in (HeadRule(count, rank_count, len(fitting) == 1) for count in fitting)
    }
    return next(iter(rules.values())) if len(rules) == 1 else None


def _saved_widths(
    layouts: Mapping[str, Cut], saved_count: int
) -> Iterator[tuple[Width, Sequence[int]]]:
    """The sub-parameters that are cut, and what each saved rank has of them."""
    for name, layout in layouts.items():
        parts = degrees.sub_parameters(layout)
        if parts is None:
            continue
        widths_by_part = _widths_of(layout, parts, saved_count)
        for total, widths in zip(parts.widths, widths_by_part, strict=True):
            yield (total, _has_heads(name)), widths


def _widths_of(layout: Cut, parts: SubParameters, saved_count: int) -> list[list[int]]:
    """The elements of each sub-parameter on the axis that each rank has."""
    widths = [[0] * saved_count for _ in parts.widths]
    pieces = sorted(layout.pieces, key=lambda piece: piece.offsets[parts.axis])
    per_part = len(pieces) // len(parts.widths)
    for index, piece in enumerate(pieces):
        widths[index // per_part][piece.rank] = piece.sizes[parts.axis]
    return widths


def _possible_heads(saved: Mapping[Width, Sequence[int]]) -> list[int | None]:
    """Every number of heads that would cut one of these otherwise than evenly."""
    numbers = {
        divisor
        for total, has_heads in saved
        if has_heads
        for low in range(1, int(total**0.5) + 1)
        if total % low == 0
        for divisor in (low, total // low)
    }
    return [None, *sorted(numbers)]


def _has_heads(name: str) -> bool:
    """Whether AutoTP cuts a parameter of this name between heads, where they divide it."""
    module = name.rpartition(".")[0]
    return module not in _HEADS and not any(part in module for part in _MLP)
