"""The cuts that an engine of AutoTP has made, where a training resumes and can be asked.

DeepSpeed keeps its affine map on the model (0.19.8 ``module_inject/layers.py``:
``collect_autotp_universal_checkpoint_info``), of all ranks and for every parameter. So
what is written for this engine is cut as it cuts, unevenly where it does, and needs
neither rules nor a checkpoint of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.zero.files.state_files import State
from converters.zero.parallel import affine_map
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.cuts import Cut, Shape

Info = Mapping[str, Any]  # ``universal_checkpoint_info`` of the engine's model
_current: ContextVar[Info | None] = ContextVar("engine_cuts", default=None)


@contextmanager
def using(info: Info | None) -> Iterator[None]:
    """Cuts as this engine does what is written
    for tensor-parallel ranks in this block."""
    token = _current.set(info)
    try:
        yield
    finally:
        _current.reset(token)


def are_known() -> bool:
    """Whether this is in the block of an engine that says its cuts."""
    return _current.get() is not None


def table_for(model: State, rank_count: int) -> CutTable | None:
    """The cuts of the engine,
    for a checkpoint of this model file; ``None`` where none is known."""
    info = _current.get()
    if info is None:
        return None
    entries = affine_map.params(info, "the engine of this training")
    return CutTable(model, rank_count, info, entries, None)


def cut_of(table: CutTable, name: str, shape: Shape) -> Cut | None:
    """How the engine cuts a parameter of this shape; ``None`` where it does not say.

    ``CheckpointError`` where it has another shape there, or says what is not read.
    """
    try:
        recorded = table.entry_of(name)
        if recorded is None:
            return None
        layout = affine_map.cut_from(recorded, table.rank_count)
    except MalformedError as error:
        raise table.fail(name, error) from error

    if layout.shape != shape:
        raise CheckpointError(
            f"{table.model.path} has {name} as {words.shape(shape)}, this training as "
            f"{words.shape(layout.shape)}; give it the same model",
            "refused",
        )
    return layout
