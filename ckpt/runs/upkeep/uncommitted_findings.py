"""Checkpoints of a run without a valid manifest that are not complete (torn,
or being saved), and what commits those that are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

from ckpt.folders import locks, replacing
from ckpt.folders.filenames import MANIFEST
from ckpt.runs import engines, pruning
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import later_save
from ckpt.runs.foreign import torn
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import is_checkpoint, is_numbered
from ckpt.runs.states import listing, save_dirs, skipped
from ckpt.runs.states.status import CheckpointState, CheckpointStatus
from ckpt.runs.upkeep.findings import Finding, changed_lately
from converters.storage import local
from converters.words import counted, shell_word, some, verb
from converters.zero.files.discovery import is_tag_folder


def uncommitted_findings(status: CheckpointStatus, is_deepspeed_run: bool) -> Iterator[Finding]:
    """The faults of a checkpoint without a valid manifest; none if it is complete.

    ``is_deepspeed_run`` is whether anything in the run is DeepSpeed's; else nothing is
    renamed.
    """
    checkpoint = status.checkpoint
    folder, manifest = checkpoint.folder, checkpoint.manifest
    if status.complete or pruning.is_trash(folder):
        return  # of trash something is said already
    if checkpoint.is_universal:
        yield Finding(folder, status.description)  # it is made again, not brought back
        return
    is_unknown = status.state is CheckpointState.UNKNOWN
    if is_unknown and not is_checkpoint(folder):
        return  # perhaps not a checkpoint at all
    if manifest is None and is_tag_folder(folder):
        # the run is a save_dir of DeepSpeed itself
        yield Finding(folder, status.description)
        return
    if manifest is not None and (later_finding := later_save(folder, manifest)) is not None:
        yield Finding(folder, _describe_later_save(folder, manifest, later_finding))
        return
    if not folder.is_dir() or changed_lately(folder) or locks.in_use(folder):
        yield Finding(folder, _describe_uncommitted(status, changed_lately(folder)))
        return

    if pointers := list(_lost_pointers(folder, manifest)):
        yield from pointers
        return

    finding = _torn_finding(folder, is_deepspeed_run)
    yield finding or Finding(folder, _describe_uncommitted(status, was_changed=False))


def _lost_pointers(folder: Path, manifest: Manifest | None) -> Iterator[Finding]:
    """The files ``latest`` that are all that a checkpoint lacks;
    nothing if there is more."""
    if manifest is not None:
        lost_tags = _lost_latest(folder, manifest) if manifest.tag else {}
        for name, tag_name in lost_tags.items():
            yield Finding(
                folder / name,
                "is missing or cut short",
                f"name {tag_name}",
                partial(write_pointer, folder / name, tag_name),
            )
    elif (whole_tag := torn.only_tag(folder)) is not None:
        pointer_path = folder / "latest"
        yield Finding(
            pointer_path,
            f"is missing or leads nowhere, and {whole_tag} is whole",
            f"name {whole_tag}",
            partial(write_pointer, pointer_path, whole_tag),
        )


def _torn_finding(folder: Path, is_deepspeed_run: bool) -> Finding | None:
    """What to do about a folder that no resume could read;
    ``None`` if it is not known to be."""
    torn_folder = folder.with_name(f".{folder.name}.torn")
    if replacing.is_arriving(torn_folder):
        description = f"torn, and moved to {torn_folder.name} in part"
        return Finding(folder, description, "move the rest", partial(_rename, folder, torn_folder))

    if not is_deepspeed_run or not is_numbered(folder):
        return None
    if (reason := torn.why(folder)) is None:
        return None
    if torn_folder.exists() or "git lfs pull" in reason:  # which mends it where it lies
        return Finding(folder, f"torn: {reason}")

    return Finding(
        folder,
        f"torn: {reason}",
        f"rename it to {torn_folder.name} (rename it back when its files are there)",
        partial(_rename, folder, torn_folder),
    )


def _describe_uncommitted(status: CheckpointStatus, was_changed: bool) -> str:
    """Why a checkpoint is not complete, and the way on."""
    if (status.reason or "").startswith(("is being written", "is in use")):
        return status.description
    if was_changed:
        return f"{status.description}; it changed in the last minutes, so nothing is done to it yet"
    if status.checkpoint.why != manifests.ABSENT:
        return (
            f"{status.description}; bring back what is missing or was changed, or move or delete "
            "the folder"
        )

    return f"{status.description}; move or delete it if its save is over"


def _describe_later_save(folder: Path, manifest: Manifest, finding: str) -> str:
    """That something was saved into a committed checkpoint, and both ways on."""
    return (
        f"incomplete: {finding}; if trainings save their tags into {folder}, delete "
        f"{folder / MANIFEST}, so that each tag counts; else make {folder / 'latest'} name "
        f"{manifest.tag}, and move the other tag away"
    )


def _lost_latest(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The files latest with a tag in them that are all
    that the manifest misses; else nothing."""
    problem_names = [
        line.partition(":")[0] for line in manifests.check(folder, manifest, strict=True)
    ]
    pointers = engines.pointers(str(manifest.tag), engines.names(manifest))
    for file_name in problem_names:
        expected = f"sha256:{sha256(pointers.get(file_name, '').encode()).hexdigest()}"
        if file_name not in pointers or manifest.files[file_name].digest != expected:
            return {}

    return {file_name: pointers[file_name] for file_name in problem_names}


def _rename(folder: Path, torn_folder: Path) -> None:
    replacing.move(folder, torn_folder)
    local.sync_folder(folder.parent)


def write_pointer(pointer_path: Path, tag_name: str) -> None:
    """Makes a file ``latest`` name a tag, durably."""
    local.write_file(pointer_path, tag_name.encode())
    local.sync_folder(pointer_path.parent)


def adoption_hint(statuses: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on what is complete and not committed, and on what commits it."""
    complete = [status for status in statuses if status.complete]
    adoptable = [status for status in complete if status.adoptable]
    lines = []
    if adoptable:
        lines.append(
            f"{_described(len(adoptable))} complete but not committed; "
            f"ckpt doctor {shell_word(run)} --adopt commits {verb(len(adoptable), 'it', 'them')}"
        )

    foreign = [status for status in complete if not status.adoptable]
    states = [status for status in foreign if status.tier == "full"]
    lines += _state_lines(states, run)
    universal = [status for status in foreign if status.tier is None]
    if universal:
        lines.append(
            f"{_described(len(universal))} complete, in the universal format, which gets no "
            f"manifest ({some(status.checkpoint.name for status in universal)}); ckpt "
            f"from-universal makes native files of {verb(len(universal), 'it', 'them')}"
        )

    weights = [status.checkpoint.name for status in foreign if status.tier == "weights"]
    if weights:
        lines.append(
            f"{counted(len(weights), 'checkpoint')} {verb(len(weights), 'has', 'have')} a model "
            f"only and cannot be resumed ({some(weights)})"
        )

    return lines


def _state_lines(states: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on complete states that get no manifest."""
    lines = []
    tags = [status for status in states if status.is_tag and not status.is_engine_alone]
    if tags:
        lines.append(
            _uncommitted_line(tags, verb(len(tags), "a tag in a save_dir", "tags in a save_dir"))
        )
    if engines := [status.checkpoint.name for status in states if status.is_engine_alone]:
        lines.append(
            f"{some(engines)} {verb(len(engines), 'is', 'are')} of the engine alone (of "
            "trainer.save_model()): the Trainer cannot go on from it, and ckpt doctor --adopt, "
            "prune and slim leave it alone"
        )
    states, names_by_reason = _by_reader(states, run)
    for reason, names in names_by_reason.items():
        lines.append(
            f"{some(names)} {verb(len(names), 'is', 'are')} complete, and a resume of this run "
            f"passes over {verb(len(names), 'it', 'each')}: {reason}"
        )
    own_runs = [status for status in states if status.is_save_dir]
    if own_runs:
        words = verb(len(own_runs), save_dirs.WHY, "save_dirs with tags of their own")
        lines.append(_uncommitted_line(own_runs, words))
    if others := [status for status in states if not status.is_tag and not status.is_save_dir]:
        lines.append(_uncommitted_line(others, "not of a kind that is committed"))

    return lines


def _by_reader(
    statuses: Sequence[CheckpointStatus], run: Path
) -> tuple[list[CheckpointStatus], dict[str, list[str]]]:
    """Those that a resume of the run takes, and the names of others by the reason."""
    candidates = [status for status in statuses if status.is_tag or status.is_save_dir]
    others = [status for status in statuses if status not in candidates]
    present = listing.checkpoints_in(run, keeps_unread=True) if others else []
    names_by_reason: dict[str, list[str]] = {}
    for status in others:
        reason = skipped.other_trainer(status.checkpoint, status.writer, present)
        if reason is None:
            candidates.append(status)
        else:
            names_by_reason.setdefault(reason, []).append(status.checkpoint.name)
    return candidates, names_by_reason


def _uncommitted_line(statuses: Sequence[CheckpointStatus], reason: str) -> str:
    """A line on complete ones that get no manifest, and why."""
    number = len(statuses)
    names = some(status.checkpoint.name for status in statuses)
    return (
        f"{names} {verb(number, 'is', 'are')} complete, written by {_writers(statuses)}; a resume "
        f"takes {verb(number, 'it as it is', 'them as they are')}; "
        f"{verb(number, 'it is', 'they are')} "
        f"{reason}, so that ckpt doctor --adopt, prune and slim leave "
        f"{verb(number, 'it', 'them')} alone"
    )


def _described(number: int) -> str:
    return f"{counted(number, 'checkpoint')} {verb(number, 'is', 'are')}"


def _writers(statuses: Sequence[CheckpointStatus]) -> str:
    return ", ".join(sorted({str(status.writer) for status in statuses}))
