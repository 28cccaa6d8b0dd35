"""Whether the files of several model ranks are there, and of one save."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import words
from converters.accessors import is_whole_number, missing_numbers
from converters.errors import CheckpointError
from converters.source import Place
from converters.storage import misplaced_files
from converters.zero.files import all_ranks, state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import folder_files
from converters.zero.model_ranks.folder_files import FolderFiles

# keys of model files that are the same on every rank of one save
_COMMON = (
    *("global_steps", "global_samples", "skipped_steps"),
    *("ds_version", "dp_world_size", "mp_world_size"),
)


def require_numbered(place: Place, label: str, count: int, numbers: Collection[int]) -> None:
    """Raises unless there is a file for each number below ``count``, and no other.

    ``label`` says which files, with N for the number: "mp_rank_N_model_states.pt".
    """
    absent_numbers = missing_numbers(count, numbers)
    surplus_numbers = sorted(number for number in set(numbers) if number >= count)
    if absent_numbers:
        raise CheckpointError(
            f"{place.folder} lacks {label} for N = {all_ranks.rank_list(absent_numbers)}, "
            f"expected {count} of them; copy them here from the save"
            f"{misplaced_files.missing(place.folder)}",
            "incomplete",
        )

    if surplus_numbers:
        raise CheckpointError(
            f"{place.folder} has {label} for N = {all_ranks.rank_list(surplus_numbers)}, "
            f"expected {count} of them only: they are of another save; move them away"
        )


def require_no_further_ranks(folder: Path, models: Mapping[int, State]) -> None:
    """Raises where model files of higher ranks were left behind by a save of more ranks.

    ``models`` has a file of each model-parallel rank. Those beyond what the first one
    says count only if they say another number themselves.
    """
    first_rank = min(models)
    count = models[first_rank].root.get("mp_world_size")
    if not is_whole_number(count, 1):
        return

    others = {
        rank: models[rank].root.get("mp_world_size") for rank in sorted(models) if rank >= count
    }
    surplus_ranks = [rank for rank, stated in others.items() if stated != count]
    if surplus_ranks:
        stated = state_files.shown(others[surplus_ranks[0]])
        raise CheckpointError(
            f"{folder} has files of mp_rank_{surplus_ranks[0]:02d} (mp_world_size {stated}), but "
            f"{models[first_rank].path.name} is of a save by "
            f"{words.counted(count, 'model-parallel rank')}: those of rank "
            f"{all_ranks.rank_list(surplus_ranks)} are of another save; move them away"
        )


def require_one_model_rank(place: Place, files: FolderFiles, model: State) -> None:
    """Raises where experts lie on several model-parallel ranks, whose files may be lost."""
    count = model.root.get("mp_world_size")
    saved_count = count if is_whole_number(count) else 1
    if files.model_ranks != [0] or saved_count > 1:
        label = "*mp_rank_N_model_states.pt"
        require_numbered(place, label, max(saved_count, 1), files.model_ranks)
        raise model.fail(f"is of one of {saved_count} model-parallel ranks")


def require_same_step(models: Sequence[State]) -> None:
    """Raises if model files disagree on what every rank of one save writes alike."""
    for key in _COMMON:
        expected = models[0].root.get(key)
        for model in models[1:]:
            value = model.root.get(key)
            # only numbers and text are compared: of nested lists that takes for ever
            is_plain = isinstance(value, (int, str, type(None)))
            if not is_plain or value != expected:
                raise CheckpointError(
                    f"{model.path} is of another save than {models[0].path.name}: its {key} is "
                    f"{state_files.shown(value)}, expected {state_files.shown(expected)}; copy "
                    "the file of this save here"
                )


def optimizers_of(place: Place, paths: Mapping[int, Path], model_rank: int) -> list[State]:
    """The optimizer files of a model rank, in the order of its data ranks.

    ``CheckpointError`` unless all are there, of one save.
    """
    states = {rank: folder_files.read(path) for rank, path in sorted(paths.items())}
    return all_ranks.in_rank_order(place, states, all_ranks.of_model_rank("optimizer", model_rank))


def require_same_progress(ranks: Sequence[State]) -> None:
    """Raises if optimizer files of several model ranks are of several steps."""
    expected = _progress(ranks[0]) if ranks else {}
    for state in ranks[1:]:
        all_ranks.require_same_progress(ranks[0], expected, state, _progress(state))


def _progress(state: State) -> dict[str, Any]:
    """What does not depend on the param groups, which differ between model ranks."""
    facts = state_files.progress(state)
    shared = ("zero_stage", "ds_version", "loss scaler", "base_optimizer_state_step", "step of")
    return {key: value for key, value in facts.items() if key.startswith(shared)}
