"""Model and optimizer as two folders of DCP side by side, as composer and scripts save them.

    model/    NAME
    optim/    state | NAME | exp_avg, param_groups | 0 | lr

Source: composer 0.32 ``checkpoint/save.py`` (``save_model_to_disk``,
``save_optim_to_disk``).
"""

from __future__ import annotations

from pathlib import Path

from converters.dcp import reader as dcp_reader
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.dcp.dcp_state import DcpState
from converters.dcp.keys import layouts
from converters.dcp.optimizer_state import SavedOptimizer
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.source import Place
from converters.storage import open_files, stores


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> ShardedCheckpoint:
    """A folder with those of model and optimizer; ``tag`` has no meaning here.

    Without ``complete`` a damaged optimizer is noted, and the weights are read.
    ``CheckpointError`` for what is damaged or incomplete.
    """
    model = DcpState(path / filenames.DCP_MODEL)
    layout = layouts.split(model.leaves, model.folder)
    notes: tuple[str, ...] = ()
    optimizer = None
    try:
        state = DcpState(_optimizer_folder(path))
        optimizer = SavedOptimizer.beside(state, layout)
        if lost_file := dcp_reader.missing_file(optimizer):
            raise CheckpointError(lost_file, "incomplete")
        if complete:
            dcp_reader.require_complete(optimizer)
    except CheckpointError as error:
        if complete or error.kind == "refused":
            raise
        optimizer, notes = None, (f"the optimizer is not read: {error}",)

    place = Place(path, path, path.name)
    return dcp_reader.assembled("dcp-parts", place, model, layout, optimizer, notes)


def _optimizer_folder(path: Path) -> Path:
    """The folder of the optimizer; ``CheckpointError`` where there are two of them."""
    folders = [path / name for name in filenames.DCP_OPTIMIZERS if stores.is_folder(path / name)]
    if len(folders) > 1:
        raise CheckpointError(
            f"{path} has {folders[0].name} and {folders[1].name}, expected one optimizer; move "
            "the folder of the other save away"
        )
    return folders[0]
