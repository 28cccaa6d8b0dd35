"""Which run a training is: a new one,
or that of the checkpoint it resumed from (``lineage``).

A resume notes it for the engine that it loaded. Whoever loads an engine without ckpt,
by ``engine.load_checkpoint`` or ``accelerator.load_state``, goes on from the run whose
checkpoints are in the folder that it saves into; an engine that nothing was loaded into
begins a run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from ckpt.runs import lineage, manifest
from ckpt.runs.foreign import succession
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, RunCheckpoint, members, open_checkpoint
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
_lines_by_engine: WeakKeyDictionary[object, Line] = WeakKeyDictionary()  # by engine
_launches: set[str] = set()  # of this process


def begin(engine: object = None) -> Line:
    """The line of a training that starts from nothing, noted for ``engine``."""
    return _note(engine, Line.begin())


def go_on(engine: object, source: Manifest | None, step: int) -> Line:
    """The line of a training that resumed from a checkpoint at ``step``,
    noted for ``engine``.

    ``source``: its manifest, ``None`` if it has none. ``engine`` may be ``None``.
    """
    return _note(engine, Line.go_on(source, step))


def line_after(engine: object, folder: str | os.PathLike[str] | None, step: int) -> Line:
    """The line of a training of ``engine`` at ``step``
    that resumed from ``folder``, if any."""
    if folder is None or not step:
        return begin(engine)
    path = Path(os.path.abspath(folder))
    source = open_checkpoint(path).manifest
    line = succession.line_after(path, step) if source is None else None
    return _note(engine, line) if line else go_on(engine, source, step)


def line_of(engine: object, folder: Path, loaded_step: int | None) -> Line:
    """The line of the training of ``engine``, which saves into ``folder``.

    ``loaded_step``: its step, where it has loaded a checkpoint by itself.
    """
    if engine in _lines_by_engine:
        return _lines_by_engine[engine]
    if loaded_step is None:
        return begin(engine)
    return _note(engine, line_in(folder, loaded_step))


def line_in(folder: Path, step: int) -> Line:
    """The line of a training at ``step`` that goes
    on from the run in ``folder``; new without one.

    The checkpoint is the newest up to that step, of the line that saved last. Where
    none is committed, the training has loaded one that was written without ckpt.
    """
    checkpoints = Run(folder).checkpoints() if folder.is_dir() else []
    older_manifests = [
        checkpoint.manifest
        for checkpoint in members(checkpoints)
        if checkpoint.manifest and checkpoint.manifest.step <= step
    ]
    if not older_manifests:
        return Line.go_on(None, step) if step else Line.begin()
    return Line.go_on(older_manifests[-1], older_manifests[-1].step)


def is_of_this_process(checkpoint: Manifest) -> bool:
    """Whether this process saved a checkpoint, in this training or in an earlier one."""
    return bool(checkpoint.line) and checkpoint.line[-1][0] in _launches


def warn_of_others(folder: Path, line: Line) -> None:
    """Logs a warning if ``folder`` holds checkpoints
    that are not of this training's line."""
    try:
        checkpoints = Run(folder).checkpoints() if folder.is_dir() else []
    except CheckpointError:  # what fails here is named when it matters
        return

    other_checkpoints = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.manifest is not None and not line.has(checkpoint.manifest)
    ]
    unmanaged = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.why == manifest.ABSENT and checkpoint.folder.parent == folder
    ]
    if other_checkpoints:
        begins = not line.ancestors
        log.warning("%s", _warning(folder, line, other_checkpoints, begins))
    if unmanaged and not line.ancestors:
        names = lineage.listed([checkpoint.name for checkpoint in unmanaged])
        log.warning(
            "%s has %s, written without ckpt. This training does not go on from it: "
            "it begins a new run. Nothing deletes or overwrites what is whole.",
            folder,
            names,
        )


def _warning(
    folder: Path, line: Line, other_checkpoints: Sequence[RunCheckpoint], begins: bool
) -> str:
    newest = max(
        (checkpoint.manifest for checkpoint in other_checkpoints if checkpoint.manifest),
        key=lambda manifest: manifest.created,
    )
    saved_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.created))
    is_own_past = all(
        checkpoint.manifest is not None and checkpoint.manifest.run == line.run
        for checkpoint in other_checkpoints
    )
    names_and_runs = [
        (checkpoint.name, checkpoint.manifest.run if checkpoint.manifest else None)
        for checkpoint in other_checkpoints
    ]

    checkpoints = lineage.described(names_and_runs, None if is_own_past else line.run)
    finding = f"{folder} has {checkpoints}, saved last at {saved_at}."
    run = lineage.shown(line.run)
    if is_own_past:
        reason = "This training went back to an earlier step and does not count them."
    elif begins:
        reason = f"This training does not go on from them: it begins {run}."
    else:
        reason = f"This training is {run} and does not count them."

    return (
        f"{finding} {reason} They are not deleted; when this training has saved, ckpt "
        f"prune {folder} --others removes them."
    )


def _note(engine: object, line: Line) -> Line:
    _launches.add(line.launch)
    if engine is not None:
        _lines_by_engine[engine] = line
    return line
