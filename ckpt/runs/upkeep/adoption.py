"""A manifest for a checkpoint that was written without ckpt, if it proves to be whole.

Nobody said that its save finished, so everything that can be checked is: that it is
whole by what its writer writes (``completeness``) and does not change meanwhile
(``liveness``), and that every record of a torch zip has its CRC32.

    survey    the states of all that have no valid manifest; one wait for all of them
    adopt     reads their bytes, and writes the manifests
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.results import FileEntry
from ckpt.runs import manifest
from ckpt.runs.ancestry import record_in
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.fields import FieldError
from ckpt.runs.foreign import intact_files, liveness, succession
from ckpt.runs.foreign.proofs import Proof
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, RunCheckpoint, leading, open_checkpoint
from ckpt.runs.states import checksums, copies, evaluation, listing, save_dirs, trainings
from ckpt.runs.states.status import CheckpointState, CheckpointStatus, saved_at, statuses_of
from ckpt.runs.upkeep import manifest_writing, one_save, saved_facts
from ckpt.runs.upkeep.saved_facts import SavedFacts
from ckpt.version import __version__
from converters.errors import CheckpointError
from converters.storage.system import flock
from converters.words import shell_word


@dataclass(frozen=True, slots=True)
class Adoption:
    """A checkpoint that proved to be whole, and the manifest that it would get."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class AdoptionOutcome:
    """The outcome for a checkpoint without a manifest; ``reason`` says why it got none.

    One that is complete and of a kind that gets none, or of which ckpt cannot tell, has
    not ``failed``. ``bare`` is what had no checksum of its own, so that the manifest has
    it as it was found; ``doubt`` is what speaks against one save, where somebody has
    said that it is one.
    """

    status: CheckpointStatus
    adopted: bool
    reason: str | None = None
    failed: bool = False
    bare: tuple[FileEntry, ...] = ()
    doubt: str | None = None

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return self.status.checkpoint.folder


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is known beside the files: the line that a checkpoint does not go on from, as
    in ``succession.line_after``, that all its files are of one save, where somebody said
    it, and whether a user asks, not a resume."""

    excluded_line: Line | None = None
    is_one_save: bool = False
    is_of_user: bool = False


def survey(
    checkpoints: Iterable[RunCheckpoint],
    wait: bool = True,
    progress: Progress = quiet,
    is_one_save: bool = False,
) -> list[CheckpointStatus]:
    """The states of those checkpoints that are not committed; as ``statuses_of``.

    One whose manifest is damaged is judged as if it had none. One that lacks what its
    manifest lists is incomplete. A link to another one of these has the manifest of that.
    """
    present = list(checkpoints)
    linked = {entry.folder.resolve() for entry in present if not entry.folder.is_symlink()}
    candidates = [
        checkpoint
        if checkpoint.manifest is not None or checkpoint.is_unread
        else replace(checkpoint, manifest=None, why=manifest.ABSENT)
        for checkpoint in present
        if not (checkpoint.folder.is_symlink() and checkpoint.folder.resolve() in linked)
        and not checkpoint.committed
        and (checkpoint.manifest is not None or _may_be_adopted(checkpoint))
    ]

    return statuses_of(candidates, wait, progress, is_one_save, keeps_unread=True)


def nbytes_of(statuses: Iterable[CheckpointStatus]) -> int:
    """Bytes that ``adopt`` reads."""
    return sum(
        (status.checkpoint.folder / name).stat().st_size
        for status in statuses
        if _hindrance(status) is None
        for _, name in checksums.files_of(status.checkpoint.folder)
    )


def adopt(
    statuses: Iterable[CheckpointStatus],
    dry_run: bool = False,
    progress: Progress = quiet,
    is_one_save: bool = False,
) -> list[AdoptionOutcome]:
    """Commits what is complete and gets a manifest; returns what became of each checkpoint.

    ``dry_run`` proves the same and writes nothing. ``progress`` gets the bytes read.
    With ``is_one_save`` somebody has said that all files of each are of one save: what
    speaks against it hinders nothing, and its manifest says it.
    """
    if not dry_run:
        flock.require("ckpt doctor --adopt")

    surveyed = list(statuses)
    outcomes: dict[Path, AdoptionOutcome] = {}
    for status, excluded_line in _with_lines(surveyed):
        folder = status.checkpoint.folder
        if (reason := _hindrance(status)) is not None:
            failed = status.state is CheckpointState.INCOMPLETE
            outcomes[folder] = AdoptionOutcome(status, False, reason, failed)
            continue

        assert status.proof is not None
        try:
            wish = _Wish(excluded_line, is_one_save, is_of_user=True)
            adoption = _planned(status.proof, True, progress, wish)
            if dry_run:
                manifest_writing.require_place(adoption.folder, adoption.manifest)
            else:
                execute(adoption)
            bare = checksums.of_files(adoption.folder).bare
            doubt = adoption.manifest.doubt
            outcomes[folder] = AdoptionOutcome(status, True, bare=bare, doubt=doubt)
        except CheckpointError as error:
            outcomes[folder] = AdoptionOutcome(status, False, str(error), failed=True)

    return [outcomes[status.checkpoint.folder] for status in surveyed]


def _with_lines(
    statuses: Sequence[CheckpointStatus],
) -> list[tuple[CheckpointStatus, Line | None]]:
    """In the order of adoption,
    with the line that a checkpoint does not go on from, if any.

    The training that saved last comes first, so that it is the one that goes on from
    what several have in common. What a resume passes over as older than the newest
    committed one, or of another training, is not of that one's line afterwards either.
    """
    complete = [status for status in statuses if status.complete]
    incomplete = [(status, None) for status in statuses if not status.complete]
    if not complete:
        return list(incomplete)

    folder = complete[0].checkpoint.folder.parent
    newest = leading(Run(folder).checkpoints()) if folder.is_dir() else None
    ordered = [status for group in trainings.by_training(complete) for status in group]

    return [(status, _line_apart(status, newest)) for status in ordered] + list(incomplete)


def _line_apart(status: CheckpointStatus, newest: RunCheckpoint | None) -> Line | None:
    """The line of the newest committed one,
    where a later checkpoint does not go on from it."""
    if newest is None or newest.manifest is None or newest.tier != "full" or status.proof is None:
        return None
    if (status.step or 0) <= newest.manifest.step or status.checkpoint.source is not None:
        return None

    is_successor = succession.relate(newest, status.proof).relation == "follows"
    return None if is_successor else Line.of(newest.manifest)


def _hindrance(status: CheckpointStatus) -> str | None:
    """Why a checkpoint gets no manifest, by its state; ``None`` if it may get one."""
    folder = status.checkpoint.folder
    if not status.complete:
        return f"{folder}: {status.description}"
    if status.is_save_dir:
        shown_by = f"ckpt ls {shell_word(folder)} shows them"
        return f"{folder} is {save_dirs.WHY}, not a checkpoint: {shown_by}"
    if not status.adoptable:
        return (
            f"{folder} is {status.description}; a manifest is for checkpoints of DeepSpeed, the "
            "Trainer, Accelerate and torch that a training goes on from, in folders of their own"
        )

    return None


def _may_be_adopted(checkpoint: RunCheckpoint) -> bool:
    """Whether a checkpoint may get a manifest: it has none, or one that is damaged,
    or nobody knows."""
    if checkpoint.why == manifest.ABSENT or checkpoint.is_unread:
        return True

    try:
        manifest.read(checkpoint.folder)
    except CheckpointError as error:
        return error.kind == "corrupt"  # not one of a newer ckpt

    return False


def commit(folder: Path, data: bool = True) -> Manifest:
    """Gives a whole checkpoint its manifest: ``plan`` and ``execute``."""
    return execute(plan(folder, data))


def plan(folder: Path, data: bool = True) -> Adoption:
    """Proves that a checkpoint is whole;
    ``CheckpointError`` if it is not. Writes nothing.

    Without ``data`` the records of torch zips are not read: a later ``verify --data``
    compares them with the CRC32s that they had when they were saved.
    """
    if save_dirs.is_save_dir(folder):
        raise CheckpointError(
            f"{folder} is {save_dirs.WHY}, not a checkpoint, and gets no manifest", "refused"
        )

    proof = liveness.prove_at_rest(folder)
    if proof.hindrance is not None:
        raise CheckpointError(f"{folder} gets no manifest: {proof.hindrance}", "unsupported")
    if proof.tag is None and not proof.gets_manifest:
        raise CheckpointError(
            f"{folder} is whole, written by {proof.kind}; a manifest is for states that a "
            "training goes on from, in a folder, and not for Lightning's. ckpt.find takes it as "
            "it is",
            "unsupported",
        )

    return _planned(proof, data, quiet, _Wish())


def _planned(proof: Proof, data: bool, progress: Progress, wish: _Wish) -> Adoption:
    """The manifest that a whole checkpoint gets, after a look at all of its files."""
    folder, look = proof.path, liveness.look(proof.path)
    facts = saved_facts.facts_of(proof)
    doubt = None
    if facts.source is not None:
        doubt = one_save.doubt(facts.source, wish.is_one_save, wish.is_of_user)

    file_names = _file_names(folder, facts)
    for file_name in file_names:
        intact_files.require_file(folder / file_name)

    try:
        line = succession.line_after(folder, facts.step, wish.excluded_line)
        new_manifest = replace(_manifest(facts, proof, file_names, line, progress), doubt=doubt)
    except FieldError as error:
        raise CheckpointError(
            f"{folder} is whole, but a manifest cannot list it: {error}; rename or move away "
            "what it names",
            "unsupported",
        ) from error

    # the other digests were made of all bytes just now
    zips = {name: file for name, file in new_manifest.files.items() if file.kind == "zip"}
    if problems := manifest.check(folder, replace(new_manifest, files=zips), data, progress):
        raise CheckpointError(f"{folder} is damaged: {problems[0]}")
    if data and look != liveness.look(folder):
        raise CheckpointError(
            f"{folder} is being written right now: it changed while it was read; try again when "
            "its save or copy is done",
            "refused",
        )

    return Adoption(folder, new_manifest)


def execute(adoption: Adoption) -> Manifest:
    """Writes the manifest; as ``manifest_writing.write``."""
    manifest_writing.write(adoption.folder, adoption.manifest)

    return adoption.manifest


def _manifest(
    facts: SavedFacts,
    proof: Proof,
    file_names: Sequence[str],
    line: Line | None,
    progress: Progress,
) -> Manifest:
    """What the save would have written, had it been ckpt's."""
    folder, step = proof.path, facts.step
    original_folder = _original_folder(folder)
    record = record_in(folder)
    origin = None if record is None else record.source
    versions = {"ckpt": __version__}
    if facts.deepspeed:
        versions["deepspeed"] = facts.deepspeed

    return Manifest(
        step=step,
        tag=facts.tag,
        tier="full",
        save=uuid.uuid4().hex,
        created=_saved_at(folder, original_folder, file_names),
        stage=facts.stage,
        world_size=facts.world_size,
        versions=versions,
        metrics=evaluation.metrics(proof.history or (), step),
        files={
            file_name: manifest.digest(folder / file_name, progress) for file_name in file_names
        },
        run=line.run if line else None,
        line=line.at(step) if line else (),
        name=original_folder.name,
        made_of=None if origin is None else origin.save,
        source=origin,
    )


def _original_folder(folder: Path) -> Path:
    """The folder that a checkpoint was saved into:
    of a copy by hand that of its original."""
    copied = copies.originals(listing.checkpoints_in(folder.parent, keeps_unread=True))
    return copied[folder].folder if folder in copied else folder


def _saved_at(folder: Path, original_folder: Path, file_names: Sequence[str]) -> float:
    """When a checkpoint was saved, in seconds since 1970:
    by its newest file, or its original's."""
    if original_folder != folder:
        manifest_of_original = open_checkpoint(original_folder).manifest
        return manifest_of_original.created if manifest_of_original else saved_at(original_folder)
    return max((folder / file_name).stat().st_mtime for file_name in file_names)


def _file_names(folder: Path, facts: SavedFacts) -> list[str]:
    """Every file but hidden ones, temporary ones and those of the tool; without DeepSpeed what
    describes a distributed checkpoint, too."""
    has_descriptions = facts.tag is None
    return [
        name
        for path, name in checksums.files_of(folder)
        if has_descriptions or path.name != checksums.DCP_METADATA
    ]
