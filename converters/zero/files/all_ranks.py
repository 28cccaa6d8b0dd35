"""Whether the files of all ranks are there, and of one save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from converters.detect import filenames
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import misplaced_files, stores
from converters.zero.files import discovery, state_files
from converters.zero.files.state_files import State

_MODEL_RANK = LazyPattern(r"mp_rank_(\d+) ")
_IN_NAME = LazyPattern(r"mp_rank_\d+")
_DATA_RANK = LazyPattern(r"zero_pp_rank_\d+_")


def in_rank_order(
    place: discovery.Place, optimizers: Mapping[int, State], file_kind: str = "optimizer"
) -> list[State]:
    """The optimizer files in rank order; raises unless all are there, of one save.

    ``file_kind`` says in messages whose they are.
    """
    if not optimizers:
        return []

    first_state, *other_states = optimizers.values()
    rank_count = first_state.optimizer.get("partition_count", len(optimizers))
    if isinstance(rank_count, list):  # one for each group
        counts = [count for count in rank_count if isinstance(count, int)]
        rank_count = max(counts, default=len(optimizers))

    if not isinstance(rank_count, int) or not 1 <= rank_count <= state_files.MAX_RANKS:
        raise first_state.fail(
            f"partition_count is {state_files.shown(rank_count)}, expected a number of ranks"
        )

    node_local = first_state.setting("checkpoint", "use_node_local_storage") is True
    require_ranks(place, rank_count, optimizers, file_kind, node_local)
    progress = state_files.progress(first_state)
    for state in other_states:
        require_same_progress(first_state, progress, state, state_files.progress(state))

    return list(optimizers.values())


def of_model_rank(file_kind: str, model_rank: int | None) -> str:
    """The words for files in a message,
    with their model-parallel rank if there are several."""
    return file_kind if model_rank is None else f"mp_rank_{model_rank:02d} {file_kind}"


def require_same_progress(
    first_state: State, expected: Mapping[str, Any], state: State, progress: Mapping[str, Any]
) -> None:
    """Raises if a file says of something that both speak of what the first one does not."""
    for key in expected.keys() & progress.keys():
        if progress[key] != expected[key]:
            raise CheckpointError(
                f"{state.path} is of another save than {first_state.path.name}: "
                f"its {key} is {progress[key]}, expected {expected[key]}; copy the "
                "file of this save here"
            )


def require_ranks(
    place: discovery.Place,
    rank_count: int,
    present_ranks: Iterable[int],
    file_kind: str,
    node_local: bool = False,
) -> None:
    """Raises ``CheckpointError`` unless there is a file for each rank, and no more."""
    missing_ranks = sorted(set(range(rank_count)) - set(present_ranks))
    surplus_ranks = sorted(set(present_ranks) - set(range(rank_count)))

    if missing_ranks:
        origin = "the save"
        if node_local:
            origin = "the folders of the other nodes, which have the rest (use_node_local_storage)"
        raise CheckpointError(
            f"{place.folder} was saved by {_rank_words(rank_count, file_kind)}, but the "
            f"{missing_files(place, file_kind, missing_ranks)}; copy them here "
            f"from {origin}{misplaced_files.missing(place.folder)}",
            "incomplete",
        )

    if surplus_ranks:
        raise CheckpointError(
            f"{place.folder} was saved by {_rank_words(rank_count, file_kind)}, but has "
            f"{file_kind} files of rank {rank_list(surplus_ranks)} too: they are of another save; "
            "move them away"
        )


def missing_files(place: discovery.Place, file_kind: str, ranks: Sequence[int]) -> str:
    """That the files of ``ranks`` are missing, with the name of the first one, if others
    of its kind show how they are called."""
    name = _name_of(place, file_kind, ranks[0])
    others = " and others" if len(ranks) > 1 else ""
    example = f" ({name}{others})" if name else ""
    return f"{file_kind} files of rank {rank_list(ranks)} are missing{example}"


def _rank_words(rank_count: int, file_kind: str) -> str:
    """Whose files are counted: of several model ranks each has some of every data rank."""
    return f"{rank_count} {'data-parallel ' if _MODEL_RANK.match(file_kind) else ''}ranks"


def _name_of(place: discovery.Place, file_kind: str, rank: int) -> str | None:
    """The name of a rank's file, as that of another one of its kind has it."""
    model_rank = _MODEL_RANK.match(file_kind)
    pattern = {"optimizer": filenames.OPTIMIZER, "model": filenames.PARTITIONED}.get(
        file_kind[model_rank.end() :] if model_rank else file_kind
    )
    names = [name for name in stores.names(place.folder) if pattern and pattern.fullmatch(name)]
    if not names:
        return None

    name = _DATA_RANK.sub(f"zero_pp_rank_{rank}_", names[0])
    if model_rank is not None:
        name = _IN_NAME.sub(f"mp_rank_{model_rank[1]}", name)
    return None if name in names else name


def rank_list(ranks: Sequence[int]) -> str:
    """Ranks for a message, the first eight of them."""
    remainder = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + remainder
