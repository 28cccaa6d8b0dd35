"""The lengths of parameters, where only ``param_slice_mappings`` have them.

BF16_Optimizer of a pipeline writes no ``param_shapes``, but for each rank where the
pieces of parameters lie in its partition: ``{name: fragment_address(numel, start)}``
(DeepSpeed 0.19.8 ``runtime/bf16_optimizer.py``, ``utils/tensor_fragment.py``).

    rank 0   |--- a ---|-- b --|
    rank 1   |-- b --|-- c --|pad|
"""

from __future__ import annotations

from collections.abc import Sequence

from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.zero.files import state_files, typed
from converters.zero.files.state_files import State

KEY = "param_slice_mappings"


def numels(ranks: Sequence[State]) -> list[dict[str, int]]:
    """The elements of each parameter of each group, in the order of the group.

    ``CheckpointError`` unless the pieces lie one after another in every partition.
    """
    by_rank = [_pieces(state) for state in ranks]
    if len({len(groups) for groups in by_rank}) != 1:
        raise ranks[-1].fail(f"{KEY} has another number of groups than {ranks[0].path.name}")

    return [
        _joined(ranks, [groups[number] for groups in by_rank]) for number in range(len(by_rank[0]))
    ]


def _joined(ranks: Sequence[State], pieces_by_rank: Sequence[dict[str, int]]) -> dict[str, int]:
    """The elements of whole parameters, from their pieces on all ranks."""
    result: dict[str, int] = {}
    for state, pieces in zip(ranks, pieces_by_rank, strict=True):
        last_name = next(reversed(result), None)
        for index, (name, numel) in enumerate(pieces.items()):
            # only the last parameter of a rank goes on in the next one
            if name in result and (index or name != last_name):
                raise state.fail(f"{KEY} has {name} in two places")
            result[name] = result.get(name, 0) + numel

    return result


def _pieces(state: State) -> list[dict[str, int]]:
    """The elements of each piece in a rank's partitions, by group and name."""
    value = state.optimizer.get(KEY)
    if not isinstance(value, list):
        raise CheckpointError(
            f"{state.path} has neither param_shapes nor {KEY}, so its weights have no names; "
            "load it with DeepSpeed in the training that wrote it, and save them there",
            "unsupported",
        )

    groups = []
    for index, mapping in enumerate(typed.dicts(state.path, KEY, value)):
        pieces: dict[str, int] = {}
        end = 0
        for name, address in mapping.items():
            fields = address.state if isinstance(address, Call) else None
            start = fields.get("start") if isinstance(fields, dict) else None
            numel = fields.get("numel") if isinstance(fields, dict) else None
            is_name = isinstance(name, str) and name.isprintable()
            if not is_name or start != end or not is_whole_number(numel):
                raise state.fail(
                    f"{KEY}[{index}] has {state_files.shown(name)} at element "
                    f"{state_files.shown(start)}, expected {end}"
                )
            pieces[name] = numel
            end += numel

        groups.append(pieces)

    return groups
