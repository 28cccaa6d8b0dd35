"""The checkpoint that a training goes on from, as one process sees it.

``ckpt.resuming.select`` has all ranks agree on it; ``ckpt latest`` prints it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import WEIGHTS_ONLY
from ckpt.runs.foreign import liveness
from ckpt.runs.foreign.overwriting import require_one_save
from ckpt.runs.lineage import Line
from ckpt.runs.run import Run, RunCheckpoint, is_numbered, members
from ckpt.runs.states.listing import adoption_command, candidate
from ckpt.runs.states.offers import Offer, Offers, require_deepspeed, unusable
from ckpt.runs.states.skipped import COMMITTED_ONLY, SkippedCandidate
from ckpt.runs.states.status import status_of
from ckpt.runs.states.target import interpret
from ckpt.runs.verify import states
from converters.detect import detect
from converters.detect.deepspeed import UNIVERSAL
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint that is taken, if any, and those that were passed over before it,
    the newest first.

    ``other_lines`` are committed checkpoints of other runs, which are taken only by
    name.
    """

    offer: Offer | None
    skipped: Sequence[SkippedCandidate] = ()
    other_lines: Sequence[RunCheckpoint] = ()


def choose(path: Path) -> Choice:
    """The checkpoint that ``ckpt.find(path)`` takes where one process asks.

    ``CheckpointError`` where it is one: there are checkpoints, and none can be used.
    """
    kind, name = interpret(path, None, None)
    if kind == "nothing":
        return Choice(None)
    if kind == "checkpoint":
        return Choice(requested(path if name is None else path / name, deepspeed=False))

    offers = Offers(path, deepspeed=False)
    offer = next(iter(offers), None)
    if offer is None:
        offers.require_none_lost()

    return Choice(offer, offers.skipped, offers.other_lines)


def requested(
    folder: Path,
    tag: str | None = None,
    *,
    load_foreign: bool = False,
    deepspeed: bool = True,
    committed_only: bool = False,
) -> Offer:
    """The checkpoint that was asked for by name;
    the arguments as in ``select_checkpoint``.

    ``CheckpointError`` unless it is whole, as far as can be seen without reading every
    byte.
    """
    checkpoint = candidate(folder)
    if checkpoint.manifest is None and checkpoint.why == manifests.ABSENT:
        if committed_only:
            raise _uncommitted(checkpoint)

        return _requested_foreign(checkpoint, tag, load_foreign, deepspeed)

    reason = unusable(checkpoint)
    if reason is not None:
        siblings = reversed(_of_its_run(checkpoint))
        usable = (sibling for sibling in siblings if sibling.unusable is None)
        newest = next(usable, None)
        alternative = f"; the newest committed one is {newest.folder}" if newest else ""
        raise CheckpointError(
            f"{folder} cannot be resumed from: {reason}{alternative}", "incomplete"
        )

    return Offer(checkpoint)


def _uncommitted(checkpoint: RunCheckpoint) -> CheckpointError:
    """The error for one without a manifest, where only a committed one will do."""
    folder, status = checkpoint.folder, status_of(checkpoint)
    if not status.complete or status.tier != "full":
        return CheckpointError(
            f"{folder} has no manifest.json, {COMMITTED_ONLY}, and it is {status.description}",
            "refused",
        )

    commit = f"{adoption_command(folder)} commits it, or " if status.adoptable else ""
    return CheckpointError(
        f"{folder} has no manifest.json, and {COMMITTED_ONLY}; it is complete: {commit}leave "
        "committed_only out to go on from it as it is",
        "refused",
    )


def _requested_foreign(
    checkpoint: RunCheckpoint, tag: str | None, load_foreign: bool, deepspeed: bool
) -> Offer:
    """One without a manifest,
    which has to prove that it is whole, unless ``load_foreign``."""
    folder = checkpoint.folder
    tag_folder = tag if tag is not None and (folder / tag).is_dir() else None
    is_native = detect(folder, tag_folder).kind.name != UNIVERSAL
    if load_foreign and is_native and states(folder, tag_folder)[1] is None:
        return Offer(checkpoint)

    proof = liveness.prove_at_rest(folder, tag_folder)
    require_one_save(folder, proof.tag)
    if not proof.resumable:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {proof.hindrance or WEIGHTS_ONLY}",
            "incomplete",
        )

    if deepspeed:
        require_deepspeed(proof)

    return Offer(checkpoint, proof)


def _of_its_run(checkpoint: RunCheckpoint) -> list[RunCheckpoint]:
    """The other committed checkpoints of the same run, which an error may offer instead.

    What lies beside a folder may be of another training: the manifests tell. Without
    one, only what is numbered as it is counts.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    siblings = Run(folder.parent).checkpoints()
    if manifest is not None and manifest.run is not None:
        line_members = members(siblings, Line.of(manifest))
        return [member for member in line_members if member.folder != folder]
    if not is_numbered(folder):
        return []

    committed = [sibling for sibling in siblings if sibling.folder != folder and sibling.manifest]
    return [checkpoint for checkpoint in committed if is_numbered(checkpoint.folder)]
