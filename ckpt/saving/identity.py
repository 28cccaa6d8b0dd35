"""Which run a training is: a new one, or that of the checkpoint it resumed from (``lineage``).

A resume notes it for the engine that it loaded. Whoever loads an engine without ckpt, by
``engine.load_checkpoint`` or ``accelerator.load_state``, goes on from the run whose checkpoints are
in the folder that it saves into; an engine that nothing was loaded into begins a run.

Source: DeepSpeed 0.19.8 ``runtime/engine.py``: ``loaded_checkpoint_dp_world_size`` is set by
``load_checkpoint`` alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ckpt.runs import lineage, manifest, succession
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint, Run, members, open_checkpoint
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
_lines: WeakKeyDictionary[Any, Line] = WeakKeyDictionary()  # by engine
_launches: set[str] = set()  # of this process


def begin(engine: Any = None) -> Line:
    """The line of a training that starts from nothing, noted for ``engine``."""
    return _note(engine, Line.begin())


def go_on(engine: Any, source: Manifest | None, step: int) -> Line:
    """The line of a training that resumed from a checkpoint at ``step``, noted for ``engine``.

    ``source``: its manifest, ``None`` if it has none. ``engine`` may be ``None``.
    """
    return _note(engine, Line.go_on(source, step))


def line_after(engine: Any, folder: str | os.PathLike[str] | None, step: int) -> Line:
    """The line of a training of ``engine`` at ``step`` that resumed from ``folder``, if any."""
    if folder is None or not step:
        return begin(engine)
    path = Path(os.path.abspath(folder))
    source = open_checkpoint(path).manifest
    line = succession.line_after(path, step) if source is None else None
    return _note(engine, line) if line else go_on(engine, source, step)


def line_of(engine: Any, folder: Path) -> Line:
    """The line of the training of ``engine``, which saves into ``folder``."""
    if engine in _lines:
        return _lines[engine]
    if getattr(engine, "loaded_checkpoint_dp_world_size", None) is None:
        return begin(engine)
    return _note(engine, line_in(folder, int(engine.global_steps)))


def line_in(folder: Path, step: int) -> Line:
    """The line of a training at ``step`` that goes on from the run in ``folder``; new without one.

    The checkpoint is the newest up to that step, of the line that saved last.
    """
    checkpoints = Run(folder).checkpoints() if folder.is_dir() else []
    older = [c.manifest for c in members(checkpoints) if c.manifest and c.manifest.step <= step]
    return Line.go_on(older[-1], older[-1].step) if older else Line.begin()


def is_of_this_process(checkpoint: Manifest) -> bool:
    """Whether this process saved a checkpoint, in this training or in an earlier one."""
    return bool(checkpoint.line) and checkpoint.line[-1][0] in _launches


def warn_of_others(folder: Path, line: Line) -> None:
    """One warning if ``folder`` holds checkpoints that are not of this training's line."""
    try:
        checkpoints = Run(folder).checkpoints() if folder.is_dir() else []
    except CheckpointError:  # what fails here is named when it matters
        return
    others = [c for c in checkpoints if c.manifest is not None and not line.has(c.manifest)]
    unknown = [c for c in checkpoints if c.why == manifest.ABSENT and c.folder.parent == folder]
    if others:
        log.warning("%s", _warning(folder, line, others, begins=not line.ancestors))
    if unknown and not line.ancestors:
        names = lineage.listed([c.name for c in unknown])
        log.warning(
            "%s has %s, written without ckpt. This training does not go on from it: it begins a "
            "new run. Nothing deletes or overwrites what is whole.",
            folder,
            names,
        )


def _warning(folder: Path, line: Line, others: Sequence[Checkpoint], begins: bool) -> str:
    newest = max((c.manifest for c in others if c.manifest), key=lambda m: m.created)
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.created))
    given_up = all(c.manifest is not None and c.manifest.run == line.run for c in others)
    pairs = [(c.name, c.manifest.run if c.manifest else None) for c in others]

    what = f"{folder} has {lineage.described(pairs)}, saved last at {saved}."
    if given_up:
        why = "This training went back to an earlier step and does not count them."
    elif begins:
        why = f"This training does not go on from them: it begins {lineage.shown(line.run)}."
    else:
        why = f"This training is {lineage.shown(line.run)} and does not count them."
    return (
        f"{what} {why} They are not deleted; when this training has saved, ckpt prune {folder} "
        "--others removes them."
    )


def _note(engine: Any, line: Line) -> Line:
    _launches.add(line.launch)
    if engine is not None:
        _lines[engine] = line
    return line
