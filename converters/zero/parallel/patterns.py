"""Cuts out of the lists of patterns that DeepSpeed and Megatron-DeepSpeed record.

The lists stand in ``universal_checkpoint_info`` of a model file; the first one with a
pattern that the name begins with says how the parameter is cut:

    tp_replicated_parameter_patterns          every rank has all of it
    parameter_to_average_patterns             the mean of the ranks' values
    parameter_with_2_sub_params_cat_dim_0     two halves, each cut
    parameter_with_sub_params                 sub-parameters of given widths, each cut
    parameter_with_row_parallelism_patterns   along axis 1
    none of these                             along axis 0

Source: DeepSpeed 0.16.4 to 0.19.8, ``checkpoint/ds_to_universal.py``
(``merge_tp_slices``) and ``checkpoint/constants.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from converters.accessors import is_whole_number
from converters.errors import MalformedError
from converters.peft import patterns as expressions
from converters.zero.files import state_files
from converters.zero.parallel import cuts
from converters.zero.parallel.cuts import Cut, Shapes

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
TWO_PARTS = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
ROWS = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
WIDTHS = "sub_param_shard_widths"
_LISTS = (REPLICATED, AVERAGED, TWO_PARTS, PARTS, ROWS, VOCABULARY)
KEYS = (*_LISTS, WIDTHS)  # all that say how parameters are cut


def are_there(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint records lists of patterns."""
    return any(info.get(key) for key in _LISTS)


def cut_of(info: Mapping[str, Any], name: str, shapes: Shapes) -> Cut:
    """The cut of a parameter whose shards have these shapes."""
    if _only(listed(info, REPLICATED), name):
        return cuts.replicated(shapes)
    if _only(listed(info, AVERAGED), name):
        return cuts.averaged(shapes)
    if _only(listed(info, TWO_PARTS), name):
        return cuts.equal_parts(0, 2, shapes)

    parts = _parts(info, name)
    if parts is not None:
        return _in_parts(info, *parts, shapes)
    return cuts.along(1 if _only(listed(info, ROWS), name) else 0, shapes)


def is_vocabulary(info: Mapping[str, Any], name: str) -> bool:
    """Whether the rows of a parameter are those of a vocabulary,
    which may have been padded."""
    return _only(listed(info, VOCABULARY), name) is not None


def begins(pattern: str, name: str) -> bool:
    """Whether a name begins with what a pattern matches, as ``re.match`` has it."""
    return expressions.matches(f"(?:{pattern})[^\n]*", name)


def _only(patterns: Iterable[str], name: str) -> str | None:
    """The pattern that fits; ``MalformedError`` for several,
    of which DeepSpeed takes none."""
    fitting = [pattern for pattern in dict.fromkeys(patterns) if begins(pattern, name)]
    if len(fitting) > 1:
        raise MalformedError(f"the patterns {' and '.join(fitting[:3])} both fit it")
    return fitting[0] if fitting else None


def listed(info: Mapping[str, Any], key: str) -> Sequence[str]:
    """The patterns of a list; ``MalformedError`` for what is no list of them."""
    patterns = info.get(key) or ()
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise MalformedError(f"{key} is {state_files.shown(patterns)}, expected patterns")
    return patterns


def _parts(info: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str] | None:
    """What is recorded of the sub-parameters of a parameter,
    and the pattern that fits it."""
    records = info.get(PARTS) or ()
    if not isinstance(records, (list, tuple)):
        raise MalformedError(f"{PARTS} is {state_files.shown(records)}, expected a list")

    fitting = []
    for record in records:
        if not isinstance(record, dict):
            raise MalformedError(f"{PARTS} has {state_files.shown(record)}, expected a dict")
        pattern = _only(listed(record, "patterns"), name)
        fitting += [(record, pattern)] if pattern is not None else []

    if len(fitting) > 1:
        raise MalformedError(f"{len(fitting)} entries of {PARTS} fit it")
    return fitting[0] if fitting else None


def _in_parts(
    info: Mapping[str, Any], record: Mapping[str, Any], pattern: str, shapes: Shapes
) -> Cut:
    """The cut of a parameter with sub-parameters.

    Since version 0.4 of the record the widths of each rank are recorded; before, each
    sub-parameter was cut evenly, and a number stands for as many equal ones.
    """
    axis, shape = record.get("partition_dim"), record.get("shape")
    if not is_whole_number(axis) or not isinstance(shape, (list, tuple)) or axis >= len(shape):
        raise MalformedError(f"{PARTS} has no shape with an axis {state_files.shown(axis)}")

    widths = info.get(WIDTHS) or {}
    if isinstance(widths, dict) and pattern in widths:
        return cuts.in_parts(axis, _widths(widths[pattern], len(shapes)), shapes)

    sizes = shape[axis]
    if is_whole_number(sizes, 1):
        return cuts.equal_parts(axis, sizes, shapes)

    if not isinstance(sizes, (list, tuple)) or not all(is_whole_number(size) for size in sizes):
        raise MalformedError(f"sub-parameters have the sizes {state_files.shown(sizes)}")
    if any(size % len(shapes) for size in sizes):
        raise MalformedError(
            f"sub-parameters of {state_files.shown(sizes)} elements are not cut evenly for "
            f"{len(shapes)} ranks, and no {WIDTHS} are recorded"
        )
    return cuts.in_parts(axis, [[size // len(shapes)] * len(shapes) for size in sizes], shapes)


def _widths(content: Any, rank_count: int) -> list[list[int]]:
    """The elements of each sub-parameter that each rank has."""
    rows = content if isinstance(content, (list, tuple)) else ()
    widths = [list(row) for row in rows if isinstance(row, (list, tuple))]
    are_numbers = all(is_whole_number(width) for row in widths for width in row)
    if not widths or len(widths) != len(rows) or not are_numbers:
        raise MalformedError(f"{WIDTHS} has {state_files.shown(content)}")
    if any(len(row) != rank_count for row in widths):
        raise MalformedError(f"{WIDTHS} is not of {rank_count} ranks")
    return widths
