"""The newest checkpoint of a run that can be relied on, for whoever wants its weights.

It is the one that a resume takes (``offers``): committed, or complete without a
manifest. Where weights alone are enough, a newer one of weights alone comes before it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt.folders.filenames import CONVERSION
from ckpt.runs import manifest as manifests
from ckpt.runs import user_paths
from ckpt.runs.recognition import is_numbered, is_run
from ckpt.runs.run import Run, RunCheckpoint, members, original_of
from converters.detect import detect, state_folders
from converters.errors import CheckpointError
from converters.options import LAST, TAG
from converters.storage.store import Name, is_url, local_path
from converters.storage.stores import source_path
from converters.words import more, shell_word
from converters.zero.files import several_models

if TYPE_CHECKING:
    from ckpt.runs.states.offers import Offers
    from ckpt.runs.states.skipped import Sort
    from ckpt.runs.states.status import CheckpointState, CheckpointStatus

_RUNS = ("deepspeed-several", "parent")  # the kinds of a run that no file latest leads on from
_MAX_REASONS = 3
_WITH_STATES: tuple[Sort, ...] = ("universal",)
_WEIGHTS: tuple[Sort, ...] = ("weights", "slimmed")
_WITH_WEIGHTS: tuple[Sort, ...] = (*_WEIGHTS, "universal")
log = logging.getLogger("ckpt")


class Newest(NamedTuple):
    """The newest checkpoint of a run, and its state; whether it is ``universal``.

    ``states`` is an older one that a training can go on from, where this one has weights
    alone.
    """

    checkpoint: RunCheckpoint
    state: CheckpointState
    universal: bool = False
    states: Path | None = None

    @property
    def remark(self) -> str:
        """A line for a user on which checkpoint it is."""
        from ckpt.runs.states.status import CheckpointState

        folder = self.checkpoint.folder
        is_complete = self.state is CheckpointState.COMPLETE
        state = "complete, not committed" if is_complete else self.state.value
        if self.universal:
            state = "complete, in the universal format"
        line = f"the newest checkpoint of {folder.parent} is {folder} ({state})"
        if self.states is None:
            return line
        return (
            f"{line}; it has weights alone, and is newer than the states that ckpt to-fp32 --last "
            f"converts: name {self.states} to take those"
        )


def newest_at(path: Path, command: str, full: bool = True, beside: Collection[Sort] = ()) -> Newest:
    """The newest checkpoint of the run at a path that is committed or complete.

    ``full`` asks for one that a training can go on from, or that is of a sort ``beside``
    these. What is passed over is logged, with the reason. ``CheckpointError`` for what
    is not a run, and for one without such a checkpoint; ``command`` is how the user
    called it, such as "ckpt to-fp32 --last".
    """
    from ckpt.runs.states import listing
    from ckpt.runs.states.offers import Offers

    run = listing.run_at(path, command)
    offers = Offers(run.path, deepspeed=False, announces=False)  # the error has the reasons
    offer = next(iter(offers), None)

    newest = _newest_of(offers, beside if full else _WITH_WEIGHTS, offer is not None)
    if newest is None and offer is not None:
        from ckpt.runs.states.status import CheckpointState

        is_committed = offer.proof is None
        state = CheckpointState.COMMITTED if is_committed else CheckpointState.COMPLETE
        newest = Newest(offer.checkpoint, state)
    elif newest is not None and offer is not None and not newest.universal:
        newest = newest._replace(states=offer.checkpoint.folder)
    if newest is not None:
        offers.announce(newest.checkpoint.folder)
        return newest
    if not listing.checkpoints_in(run.path):
        raise user_paths.instead(run.path, user_paths.RUN)

    if offers.skipped and all(entry.sort in _WEIGHTS for entry in offers.skipped):
        raise CheckpointError(
            f"{run.path} holds weights only, and {command} takes a checkpoint with states: name "
            f"the folder of weights, such as {offers.skipped[0].path}",
            "incomplete",
        )

    reasons = [
        f"{entry.path.name}: {entry.why.removeprefix(f'{entry.path}/')}" for entry in offers.skipped
    ]
    shown_reasons = "; ".join(reasons[:_MAX_REASONS]) + more(len(reasons) - _MAX_REASONS)
    raise CheckpointError(
        f"{run.path} holds no checkpoint that is committed or complete ({shown_reasons}); see "
        f"ckpt ls {shell_word(run.path)}",
        "incomplete",
    )


def _newest_of(offers: Offers, sorts: Collection[Sort], has_offer: bool) -> Newest | None:
    """The newest of some sorts that was passed over: newer than all that are offered.

    A model that ckpt made of a checkpoint is not, where one is offered.
    """
    from ckpt.runs.states import listing
    from ckpt.runs.states.status import CheckpointState

    for entry in offers.skipped:
        is_converted = has_offer and (entry.path / CONVERSION).is_file()
        if entry.sort not in sorts or is_converted:
            continue

        checkpoint = listing.candidate(entry.path)
        if checkpoint.committed:
            return Newest(checkpoint, CheckpointState.COMMITTED)
        if checkpoint.why == manifests.ABSENT:
            return Newest(checkpoint, CheckpointState.COMPLETE, entry.sort == "universal")

    return None


def choose(path: Name, tag: str | None, last: bool, command: str = "") -> tuple[Path, str | None]:
    """The checkpoint to read: the path itself,
    or with ``last`` the newest of the run there.

    With a remark on which that is, which is logged, too. ``CheckpointError`` for a run
    without ``last`` that no file latest leads on from, and for a ``tag`` with it;
    ``command`` is how the user called it, such as "ckpt show".
    """
    if not last:
        place = source_path(path)
        if tag is None and not is_url(place):
            require_checkpoint(place, command, str(LAST))
            _warn_of_newer(place)
        return place, None
    if tag is not None:
        raise CheckpointError(
            f"{TAG(tag)} does not go with {LAST}, which chooses among the checkpoints of "
            "a run; leave one of them out",
            "refused",
        )

    command = f"{command} {LAST}" if command else ""  # a function is called with last=True already
    choice = newest_at(local_path(path), command, beside=_WITH_STATES)
    _require_one_model(choice.checkpoint.folder)
    log.info("%s", choice.remark)
    return choice.checkpoint.folder, choice.remark


def _require_one_model(folder: Path) -> None:
    """``CheckpointError`` where the newest is one
    of several models that one folder holds.

    None of them is newer than the others.
    """
    root = folder.parent
    if (root / "latest").is_file() and folder.name in state_folders.tags(root):
        several_models.find(root)


def require_checkpoint(path: Path, command: str, choice: str) -> None:
    """``CheckpointError`` for a run,
    which is several checkpoints: it names them and ``choice``.

    ``choice`` is what takes the newest, such as "--last". A run whose file ``latest``
    names a checkpoint stands for that, and everything that is no run is left to its
    reader.
    """
    pointed = Run(path).pointer() if path.is_dir() else None
    if pointed is not None and pointed.tier == "weights":
        raise CheckpointError(
            f"{path / 'latest'} names {pointed.name}, which has weights only: it is a model "
            f"folder as it is, and there is nothing to convert; {choice} takes the newest "
            "checkpoint that has states, if there is one",
            "incomplete",
        )

    is_save_dir = path.is_dir() and bool(state_folders.tags(path))  # whose tags have --tag
    if is_run(path) and not is_save_dir and detect(path).kind.name in _RUNS:
        raise user_paths.run_instead(path, command, f"take the newest with {choice}")


def _warn_of_newer(path: Path) -> None:
    """Logs which checkpoint the file ``latest`` of a run leads to,
    where a newer one is there."""
    pointed = Run(path).pointer() if path.is_dir() and not is_numbered(path) else None
    if pointed is None or pointed.step is None:
        return

    from ckpt.runs.states import listing

    present = listing.checkpoints_in(path)
    later = [
        checkpoint
        for checkpoint in present
        if (checkpoint.step or 0) > pointed.step and original_of(checkpoint, present) is None
    ]
    if not later:
        return

    from ckpt.runs.states.status import statuses_of

    statuses = listing.ordered(statuses_of(later, wait=False))
    newer = [
        status
        for status in statuses
        if status.whole
        and status.tier == "full"
        and (status.step or 0) > pointed.step
        and _is_of_training(status, pointed, present)
    ]
    if newer:
        log.warning(
            "the file latest of %s leads to %s; %s is newer (%s), name it to take that one",
            path,
            pointed.folder,
            newer[-1].checkpoint.folder,
            newer[-1].description.partition(";")[0] or newer[-1].state.value,
        )


def _is_of_training(
    status: CheckpointStatus, pointed: RunCheckpoint, present: Sequence[RunCheckpoint]
) -> bool:
    """Whether a later checkpoint may be of the training of a committed one,
    or the newest is."""
    if status.proof is None:
        return status.checkpoint in members(present)
    from ckpt.runs.foreign.succession import relate

    return not pointed.committed or relate(pointed, status.proof).relation == "follows"
