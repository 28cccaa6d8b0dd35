"""Before the first step: would the saves to come succeed? Failing here costs seconds,
not a day.

What one save takes is asked of the engine, the disk is asked for as much, and every
rank tries what a save does where checkpoints will go (``filesystem_trials``).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.layout import Layout
from ckpt.engine.state_size import predicted, script_bytes
from ckpt.engine.view import EngineView, require_model_files
from ckpt.runs import pruning
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, bytes_under, members
from ckpt.saving.commit import filesystem_trials
from ckpt.saving.commit.nodes import Nodes
from ckpt.state import rank_files
from converters.errors import CheckpointError
from converters.storage import local
from converters.storage.local_store import LOCAL
from converters.torch_files.zip_headers import ALIGNMENT

# writes into a folder what a rank writes beside the states
WriteCompanions = Callable[[Path, int], object]
log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContents:
    """The bytes that one save will write, and those that stay beside it.

    - ``engines``: those whose states are saved together, unless ``has_states`` is false;
      their files have this ``alignment``
    - ``weight_bytes``: of a loadable model that all ranks write together
    - ``write_companions`` writes what lies beside the states
    - ``retention``: what is kept of ``line``; checkpoints of other runs stay where they are
    """

    engines: Sequence[EngineView]
    weight_bytes: int = 0
    exclude_frozen_parameters: bool = False
    write_companions: WriteCompanions | None = None
    has_states: bool = True
    alignment: int = ALIGNMENT
    retention: Retention | None = None
    line: Line | None = None

    def state_bytes(self) -> int:
        """Bytes of this rank's state files."""
        omits_frozen = self.exclude_frozen_parameters
        engines = self.engines if self.has_states else ()
        return sum(predicted(engine, omits_frozen, self.alignment) for engine in engines)


def check(ranks: RankGroup, nodes: Nodes, run: Path, contents: SaveContents) -> int:
    """Raises ``CheckpointError`` on every rank if a save would fail;
    every rank calls it.

    Returns the bytes of one save, in this rank's folder.
    """
    with ExitStack() as stack:
        with ranks.step() as reports:
            for engine in contents.engines if contents.has_states else ():
                require_model_files(engine)
            rank_bytes = contents.state_bytes()
            trial = stack.enter_context(filesystem_trials.opened(run, ranks.rank))
            parameters = contents.engines[0].module.parameters()
            place = filesystem_trials.examine(trial, parameters)
            rank_bytes += _companion_bytes(trial, ranks.rank, contents)
            _try_to_reserve(trial, rank_bytes)
            reports.value = [nodes.folder, rank_bytes, trial.name, place.part]

        with ranks.step() as totals:
            other_trials = [
                (rank, name, size)
                for rank, (folder, _, name, size) in enumerate(reports.heard)
                if not folder
            ]
            if not ranks.rank:
                filesystem_trials.require_seen(run, other_trials)
                totals.value = _bytes_by_folder(reports.heard, contents.weight_bytes)

    if nodes.commits:
        for lack in place.lacks():
            log.warning("%s: this filesystem %s", run, lack)
        topologies = (Layout.of_engine(each, ranks.world).topology for each in contents.engines)
        if nodes.parts > 1 and not all(topology.loads_parts for topology in topologies):
            log.warning(
                "%s: DeepSpeed does not go on from a node's part of what this training saves; "
                "before a resume join the parts with ckpt collect, and give each node all of it",
                run,
            )

    save_bytes = int(totals.heard[0][nodes.folder])
    with ranks.step():
        if nodes.commits:
            _require_pointers(run, contents.retention)
            _require_all(run, save_bytes, min_checkpoints(contents.retention), contents.line)

    return save_bytes


def _require_pointers(run: Path, retention: Retention | None) -> None:
    """``CheckpointError`` where a folder lies in the place of a pointer of the run."""
    has_best = retention is not None and retention.best is not None
    for name in ("latest", "best") if has_best else ("latest",):
        path = run / name
        if path.is_dir() and not path.is_symlink():
            raise CheckpointError(
                f"{path} is a folder, where a file is to be that names a checkpoint; give it "
                "another name",
                "refused",
            )


def _companion_bytes(trial: Path, rank: int, contents: SaveContents) -> int:
    """Bytes of what lies beside the states:
    random states, configuration, tokenizer, a script."""
    folder = trial / "beside"
    folder.mkdir()
    if contents.has_states:
        rank_files.write(folder, rank, None)
    if contents.write_companions is not None:
        contents.write_companions(folder, rank)

    nbytes = bytes_under(folder)
    if contents.has_states and not rank:
        nbytes += script_bytes(contents.engines)
    return nbytes


def room_report(nodes: Nodes, folder: Path, nbytes: int) -> list[Any]:
    """A rank's words for ``require_room``: it writes so many bytes of states into ``folder``."""
    place = [str(folder.parent), local.free_space(folder)] if nodes.commits else None
    return [nodes.folder, nbytes, place]


def require_room(reports: list[Any], weight_bytes: int) -> None:
    """``CheckpointError``, on rank 0, unless the disks have room for what all ranks write.

    ``reports``: the ``room_report`` of every rank.
    """
    save_bytes = _bytes_by_folder(reports, weight_bytes)
    for number, _, place in reports:
        if place is not None and save_bytes[number] > place[1]:
            raise CheckpointError(
                f"{place[0]} has {place[1]:,} bytes free, this checkpoint "
                f"takes {save_bytes[number]:,}; make room, or keep fewer",
                "output",
            )


def _bytes_by_folder(reports: list[Any], weight_bytes: int) -> list[int]:
    """Bytes that all ranks together write, by the number of the folder."""
    folder_bytes = [0] * (1 + max(number for number, *_ in reports))
    for number, rank_bytes, *_ in reports:
        folder_bytes[number] += rank_bytes
    folder_bytes[0] += weight_bytes
    return folder_bytes


def min_checkpoints(retention: Retention | None) -> int:
    """Checkpoints that a run keeps at least,
    by its rules; what ``every`` adds has no bound."""
    if retention is None:
        return 1
    best = retention.best[2] if retention.best else 0
    return max(1, (retention.last or 1) + best)


def _try_to_reserve(trial: Path, nbytes: int) -> None:
    """Asks the disk for as many bytes, which finds quotas too, and gives them back."""
    path = trial / "room"
    try:
        LOCAL.reserve(path, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise

        raise CheckpointError(
            f"{trial.parent}: {error.strerror}: this rank's part of one checkpoint "
            f"takes {nbytes:,} bytes; make room, or name another folder",
            "output",
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _require_all(run: Path, save_bytes: int, count: int, line: Line | None) -> None:
    """Raises unless what retention keeps,
    and the one being made, fit beside what is there."""
    free_bytes = local.free_space(run)
    present = pruning.originals(members(Run(run).checkpoints(), line))
    present_bytes = sum(checkpoint.nbytes for checkpoint in present)
    needed_bytes = save_bytes * (count + 1)
    if save_bytes > free_bytes or needed_bytes > free_bytes + present_bytes:
        raise CheckpointError(
            f"{run} has {free_bytes:,} bytes free, and a checkpoint takes "
            f"{save_bytes:,}: for the {count} that are kept and the one being made "
            f"{needed_bytes:,} are needed; make room, keep fewer, or pass "
            "preflight=False",
            "output",
        )
