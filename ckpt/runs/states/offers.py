"""The checkpoints of a run that a training can go on from, the newest first, whoever wrote them.

A committed one is known to be whole. One that was written without ckpt has to prove it,
and, if a committed one is there too, that it goes on from that one; else the resume
stops, and names both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckpt.runs import lineage
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import WEIGHTS_ONLY
from ckpt.runs.foreign import liveness
from ckpt.runs.foreign.overwriting import require_one_save
from ckpt.runs.foreign.proofs import Proof
from ckpt.runs.foreign.succession import relate
from ckpt.runs.run import (
    RunCheckpoint,
    members,
    require_read,
    without_derived,
)
from ckpt.runs.states import copies, dangling, misnumbered, skipped, trainings
from ckpt.runs.states.copies import Originals
from ckpt.runs.states.listing import checkpoints_in
from ckpt.runs.states.offer_order import TopologyFilter, newest_first
from ckpt.runs.states.skipped import (
    ENGINE_ALONE,
    UNCOMMITTED,
    SkippedCandidate,
    Sort,
)
from ckpt.runs.verify import verify
from converters.errors import CheckpointError
from converters.words import shell_word
from converters.zero.files.discovery import is_tag_folder

log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class Offer:
    """A checkpoint that a training can go on from; ``proof`` if it was written without ckpt."""

    checkpoint: RunCheckpoint
    proof: Proof | None = None


def _announce(entry: SkippedCandidate) -> None:
    log.warning("passed over %s: %s", entry.path, entry.why)


class Offers:
    """The checkpoints of a run that can be gone on from; ``skipped`` are the others, each said.

    ``deepspeed`` is whether DeepSpeed is to load it, which is said to be impossible for
    others. With ``committed_only`` what has no manifest is passed over, unproven. Without
    ``announces`` what is skipped is said only when ``announce`` is called.
    """

    def __init__(
        self,
        run: Path,
        fits: TopologyFilter | None = None,
        deepspeed: bool = True,
        committed_only: bool = False,
        announces: bool = True,
    ):
        self.run, self.deepspeed, self.committed_only = run, deepspeed, committed_only
        self.announces = announces
        self.loads_deepspeed = deepspeed or fits is not None
        present = skipped.without_universal(checkpoints_in(run))
        line_members = members(present)
        self.other_lines = [
            checkpoint
            for checkpoint in present
            if checkpoint.committed and checkpoint not in line_members
        ]
        others = self.other_lines
        candidates = [checkpoint for checkpoint in present if checkpoint not in others]
        self.checkpoints = newest_first(candidates, fits)
        self.skipped: list[SkippedCandidate] = []
        self.remarks: list[str] = []  # on later saves than the one that counts, and on latest
        self.reasons: dict[Path, str | None] = {}  # why a committed one is unusable

    def __iter__(self) -> Iterator[Offer]:
        self._print_other_lines()
        for number, offer in enumerate(self._offers_of_line()):
            if not number:
                self._skip_misnumbered(offer)
                self._note_dangling(offer)
            yield offer

        others = self.other_lines
        usable = [checkpoint for checkpoint in others if self._hindrance(checkpoint) is None]
        if usable:
            raise CheckpointError(
                f"{self.run}: nothing of the run that saved last can be resumed from, "
                f"but others are there ({self._describe_other_lines()}): pass "
                f"{usable[-1].folder} to go on from it, or name another folder to "
                "begin a new training",
                "incomplete",
            )

    def _print_other_lines(self) -> None:
        """Says on stderr whose checkpoints are taken, where there are those of several lines."""
        if not self.other_lines:
            return

        line_manifests = (checkpoint.manifest for checkpoint in self.checkpoints)
        run = next((manifest.run for manifest in line_manifests if manifest), None)
        if all(
            checkpoint.manifest is not None and checkpoint.manifest.run == run
            for checkpoint in self.other_lines
        ):
            other_lines = self._describe_other_lines()
            finding = f"has gone back from {other_lines}, which a resume takes only by name"
        else:
            other_lines = self._describe_other_lines(run)
            finding = f"saved last and goes on; a resume takes others only by name: {other_lines}"

        log.warning("%s: %s %s", self.run, lineage.shown(run), finding)

    def _describe_other_lines(self, own_run: str | None = None) -> str:
        names_and_runs = [
            (checkpoint.name, checkpoint.manifest.run if checkpoint.manifest else None)
            for checkpoint in self.other_lines
        ]
        return lineage.described(names_and_runs, own_run)

    def _offers_of_line(self) -> Iterator[Offer]:
        has_usable = False  # the newest committed one that can be used
        has_offer = False
        for checkpoint in self.checkpoints:
            if checkpoint.why != manifests.ABSENT:
                reason = self._hindrance(checkpoint)
                if reason is None:
                    if not has_usable:
                        self._note_later_saves(checkpoint, checkpoint.step, is_first=not has_offer)
                    has_usable = has_offer = True
                    yield Offer(checkpoint)
                else:
                    self.skip(checkpoint.folder, reason, skipped.sort_of(checkpoint))

                continue

            if self.committed_only:
                self.skip(checkpoint.folder, UNCOMMITTED)
                continue

            if self._is_engine_alone(checkpoint):
                self.skip(checkpoint.folder, ENGINE_ALONE, "apart")
                continue

            proof = self._prove(checkpoint)
            if proof is not None and (reason := self._other_trainer(checkpoint, proof.kind)):
                self.skip(checkpoint.folder, reason, "apart")
                continue
            if proof is not None and (has_usable or self._counts(checkpoint, proof)):
                if not has_offer:
                    step = checkpoint.step if proof.step is None else proof.step
                    self._note_later_saves(checkpoint, step, is_first=True)
                has_offer = True
                yield Offer(checkpoint, proof)

    def _skip_misnumbered(self, offer: Offer) -> None:
        """Notes those whose names say a later step than that of the first offer, as files do not.

        They come after it, and nobody would learn why.
        """
        if self.committed_only:
            return

        position = self.checkpoints.index(offer.checkpoint)
        proof_step = offer.proof.step if offer.proof is not None else None
        step = max(offer.checkpoint.step or 0, proof_step or 0)
        for path, reason in misnumbered.reasons(self.checkpoints[position + 1 :], step):
            self.skip(path, reason, "apart")

    def _note_dangling(self, offer: Offer) -> None:
        """Says that DeepSpeed's own file names what is not there, where something else is taken."""
        sentence = dangling.finding(self.run)
        if sentence is None:
            return

        remedy = f"; ckpt doctor {shell_word(self.run)} --fix mends it" if not offer.proof else ""
        self._remark(f"{sentence}; {offer.checkpoint.folder} is the newest to resume from{remedy}")

    def _remark(self, remark: str) -> None:
        self.remarks.append(remark)
        if self.announces:
            log.warning("%s", remark)

    def _other_trainer(self, checkpoint: RunCheckpoint, writer: str | None = None) -> str | None:
        return skipped.other_trainer(
            checkpoint, writer, self.checkpoints, deepspeed=self.loads_deepspeed
        )

    def _is_engine_alone(self, checkpoint: RunCheckpoint) -> bool:
        """Whether it is a tag beside checkpoints of a Trainer, which could not go on from it."""
        folder = checkpoint.folder
        return folder.is_dir() and is_tag_folder(folder) and self._has_trainers

    @cached_property
    def _has_trainers(self) -> bool:
        """Whether a Trainer saved one of these."""
        return skipped.has_trainers(self.checkpoints)

    @cached_property
    def _copies(self) -> Originals:
        """The copies by hand among these."""
        return copies.originals(self.checkpoints)

    def skip(self, path: Path, reason: str, sort: Sort = "lost") -> None:
        """Notes and says why a checkpoint is not taken."""
        if any(entry.path == path for entry in self.skipped):
            return
        entry = SkippedCandidate(path, reason, sort)
        self.skipped.append(entry)
        if self.announces:
            _announce(entry)

    def announce(self, chosen: Path) -> None:
        """Says what was skipped before ``chosen``, where it was not said at once."""
        for entry in () if self.announces else self.skipped:
            if entry.path == chosen:
                break
            _announce(entry)
        for remark in () if self.announces else self.remarks:
            log.warning("%s", remark)

    def require_none_lost(self) -> None:
        """``CheckpointError`` if a training has been here whose work a fresh start would forget.

        Weights alone do not count: no training could go on from them.
        """
        if (error := skipped.lost_work(self.run, self.skipped)) is not None:
            raise error

        dangling.require_none(self.run)
        if self.skipped:
            newest = self.skipped[0].path
            log.warning(
                "%s holds weights only, nothing to resume from: the training begins at "
                "step 0; to begin with these weights, make the model from %s "
                "(from_pretrained)",
                self.run,
                newest,
            )

    def _hindrance(self, checkpoint: RunCheckpoint) -> str | None:
        if checkpoint.folder not in self.reasons:
            reason = unusable(checkpoint) or self._other_trainer(checkpoint)
            self.reasons[checkpoint.folder] = reason
        return self.reasons[checkpoint.folder]

    def _prove(self, checkpoint: RunCheckpoint) -> Proof | None:
        """Proves a checkpoint without a manifest.

        ``None`` if it is not whole, or weights alone.
        """
        path = checkpoint.folder
        try:
            proof = liveness.prove_at_rest(path)
            require_one_save(path, proof.tag)
        except CheckpointError as error:
            require_read(error)
            if error.kind == "refused" and "right now" in str(error):
                raise
            self.skip(path, misnumbered.torn_reason(error, path))
            return None

        if proof.hindrance is not None:
            self.skip(path, proof.hindrance, "universal")
            return None
        if not proof.resumable:
            self.skip(path, WEIGHTS_ONLY, "weights")
            return None

        return proof

    def _note_later_saves(
        self, checkpoint: RunCheckpoint, step: int | None, is_first: bool
    ) -> None:
        """Says what was saved after the checkpoint that counts as the newest, and does not go on
        from it, or may not."""
        if self.committed_only:
            return

        finding: trainings.Supersession | trainings.OrderDoubt | None = None
        if checkpoint.manifest is not None:
            finding = trainings.supersession_of(checkpoint, step, self.checkpoints)
        if finding is None and is_first:
            passed_over = {entry.path for entry in self.skipped}
            present = [entry for entry in self.checkpoints if entry.folder not in passed_over]
            finding = trainings.order_doubt_of(checkpoint, step, present)
        if finding is None:
            return
        self._remark(finding.remark)

    def _counts(self, checkpoint: RunCheckpoint, proof: Proof) -> bool:
        """Whether it is of the training that saved last, whoever wrote that; as ``_succeeds``."""
        if not self._succeeds(proof):
            return False

        finding = trainings.supersession_of(checkpoint, proof.step, self.checkpoints)
        if finding is not None:
            self.skip(checkpoint.folder, finding.why, "apart")
        return finding is None

    def _succeeds(self, proof: Proof) -> bool:
        """Whether it is offered before all committed ones; ``CheckpointError`` if nobody knows."""
        path = proof.path
        usable = (
            checkpoint
            for checkpoint in without_derived(self.checkpoints, self.checkpoints)
            if checkpoint.folder not in self._copies
            and checkpoint.manifest
            and self._hindrance(checkpoint) is None
        )
        base = next(usable, None)
        if base is not None:
            relation = relate(base, proof)
            if relation.relation == "apart":
                self.skip(path, relation.why, "apart")
                return False

            if relation.relation == "other":
                raise CheckpointError(
                    f"{path} is whole and of a later step than {base.folder}, but "
                    f"{relation.why}: it is of another training; move it out of "
                    f"{self.run}, or name the one to go on from, {base.folder} or "
                    f"{path}",
                    "refused",
                )

        if self.deepspeed:
            require_deepspeed(proof, base)
        return True


def unusable(checkpoint: RunCheckpoint) -> str | None:
    """Why training cannot go on from a committed checkpoint; ``None`` if it can."""
    if checkpoint.unusable is not None:
        return checkpoint.unusable
    try:
        return verify(checkpoint).hindrance
    except CheckpointError as error:
        return str(error)


def require_deepspeed(proof: Proof, base: RunCheckpoint | None = None) -> None:
    """``CheckpointError`` for a checkpoint that DeepSpeed cannot load."""
    if proof.tag is None:
        alternative = f", such as {base.folder}" if base is not None else ""
        raise CheckpointError(
            f"{proof.path} is a whole checkpoint, written by {proof.kind}, which "
            "DeepSpeed cannot load; go on with that trainer, or name the checkpoint "
            f"to go on from{alternative}",
            "unsupported",
        )
