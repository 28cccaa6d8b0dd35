"""The folder in which Accelerate and the Trainer save FSDP's state.

    pytorch_model_fsdp_0/   optimizer_0/              SHARDED_STATE_DICT: each a folder of DCP
    pytorch_model_fsdp_0_rank1.bin   optimizer_0_rank1.bin    the same with use_dcp=False
    pytorch_model_fsdp.bin  optimizer.bin             FULL_STATE_DICT: the state dicts themselves
    pytorch_model_fsdp_rank1.bin                      LOCAL_STATE_DICT: not read

Several models have the numbers 0, 1 and so on (of FULL the first has none).

Source: accelerate 1.15 ``utils/fsdp_utils.py`` (``save_fsdp_model``,
``save_fsdp_optimizer``).
"""

from __future__ import annotations

from pathlib import Path

from converters.dcp import reader as dcp_reader
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.dcp.keys import layouts
from converters.dcp.keys.layouts import StateLayout
from converters.dcp.keys.leaves import KeyPath
from converters.dcp.optimizer_state import SavedOptimizer
from converters.dcp.saved_state import SavedState
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.storage import open_files, stores

_MODEL, _OPTIMIZER = "pytorch_model_fsdp", "optimizer"
_MODEL_PART = LazyPattern(r"pytorch_model_fsdp(?:_(\d{1,9}))?(_rank\d+)?(\.bin)?")


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> ShardedCheckpoint:
    """A folder with FSDP's model,
    or that of the model itself; the optimizer lies beside it.

    Without ``complete`` a missing or damaged optimizer is noted, and the weights are
    read. ``CheckpointError`` for what is damaged or incomplete.
    """
    root, number = _place(path)
    if root == path:  # who names the model's own folder chose one
        require_one_form(root, _MODEL, number)
    state = _model(root, number)
    layout = layouts.split(state.leaves, state.folder)
    notes: tuple[str, ...] = ()
    optimizer = None
    try:
        optimizer = _optimizer(root, number, layout, state.world_size)
        if complete:
            dcp_reader.require_complete(optimizer)
        elif optimizer is not None and (lost_file := dcp_reader.missing_file(optimizer)):
            raise CheckpointError(lost_file, "incomplete")
    except CheckpointError as error:
        if complete or error.kind == "refused":
            raise
        optimizer, notes = None, (f"the optimizer is not read: {error}",)

    notes = (*_other_models(root, number), *notes)
    place = Place(root, path, path.name)
    return dcp_reader.assembled(_kind(state), place, state, layout, optimizer, notes)


def _kind(state: SavedState) -> str:
    """The name of the row in ``converters.detect``."""
    if state.folder.suffix == ".bin":
        return "fsdp-full"
    return "fsdp" if filenames.FSDP_FOLDER.fullmatch(state.folder.name) else "fsdp-of-ranks"


def _place(path: Path) -> tuple[Path, int]:
    """The folder that model and optimizer lie in, and the model's number."""
    match = _MODEL_PART.fullmatch(path.name)
    if match is not None and stores.is_file(path / filenames.DCP):
        return path.parent, int(match[1] or 0)

    numbers = _numbers(path)
    return path, min(numbers, default=0)


def _numbers(root: Path) -> list[int]:
    """The numbers of the models in a folder."""
    matches = (_MODEL_PART.fullmatch(name) for name in stores.names(root))
    return sorted({int(match[1] or 0) for match in matches if match})


def _other_models(root: Path, number: int) -> tuple[str, ...]:
    numbers = [model for model in _numbers(root) if model != number]
    if not numbers:
        return ()
    return (f"read model {number} of {len(numbers) + 1} in {root}",)


def _model(root: Path, number: int) -> SavedState:
    state = _state(root, _MODEL, number, ())
    if state is not None:
        return state
    raise CheckpointError(f"{root} has no {_MODEL}_{number}", "incomplete")


def _optimizer(
    root: Path, number: int, model: StateLayout, world_size: int
) -> SavedOptimizer | None:
    """The optimizer of a model; ``None`` where none was saved."""
    require_one_form(root, _OPTIMIZER, number)
    state = _state(root, _OPTIMIZER, number, (_OPTIMIZER,))
    return None if state is None else SavedOptimizer.beside(state, model)


def require_one_form(root: Path, stem: str, number: int) -> None:
    """``CheckpointError`` where a model or an optimizer is there in several forms.

    A training that goes on with another state_dict_type saves the new form beside the
    old one, with other values; no file tells which is which.
    """
    numbered = f"{stem}_{number}"
    file_stem = numbered if number else stem
    forms = [f"{numbered}/"] if stores.is_folder(root / numbered) else []
    names = stores.names(root)
    for name in dict.fromkeys((numbered, file_stem)):
        if any(map(LazyPattern(name + r"_rank\d{1,9}\.bin").fullmatch, names)):
            forms.append(f"{name}_rank*.bin")
    if f"{file_stem}.bin" in names:
        forms.append(f"{file_stem}.bin")

    if len(forms) > 1:
        has_folder = stem == _MODEL and forms[0].endswith("/")
        way = f", or give {root / numbered} itself" if has_folder else ""
        raise CheckpointError(
            f"{root} has {' and '.join(forms)}, the same state in different forms: saves with "
            "different state_dict_type wrote into it; move the files of the older one away"
            f"{way}"
        )


def _state(root: Path, stem: str, number: int, prefix: KeyPath) -> SavedState | None:
    """The model or the optimizer, in whichever form it is there."""
    folder = root / f"{stem}_{number}"
    if stores.is_folder(folder):
        from converters.dcp.dcp_state import DcpState

        return DcpState(folder)

    paths = _rank_files(root, f"{stem}_{number}")
    if not paths and number == 0:
        paths = _rank_files(root, stem)
    if paths:
        from converters.dcp.rank_files import FilesOfRanks

        return FilesOfRanks(root, paths, prefix)

    path = root / (f"{stem}_{number}.bin" if number else f"{stem}.bin")
    if stores.is_file(path):
        from converters.dcp.torch_state import TorchState

        return TorchState(path, prefix)
    return None


def _rank_files(root: Path, stem: str) -> list[Path]:
    """The files of all ranks in their order; ``CheckpointError`` where one is missing."""
    pattern = LazyPattern(stem + r"_rank(\d{1,9})\.bin")
    matches = (pattern.fullmatch(name) for name in stores.names(root))
    names = {int(match[1]): match[0] for match in matches if match}
    if not names:
        return []

    missing = next((rank for rank in range(max(names)) if rank not in names), None)
    if missing is not None:
        raise CheckpointError(
            f"{root} has {names[max(names)]}, and no {stem}_rank{missing}.bin; copy it here from "
            "where it was saved",
            "incomplete",
        )
    return [root / names[rank] for rank in sorted(names)]
