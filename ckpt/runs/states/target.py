"""The meaning of a path and a tag for a resume: a run, a checkpoint, or nothing yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ckpt.runs import lineage, user_paths
from ckpt.runs.foreign import completeness, signs
from ckpt.runs.run import (
    POINTERS,
    Run,
    RunCheckpoint,
    is_checkpoint,
    is_numbered,
    is_run,
    members,
    numbered,
    open_checkpoint,
    order,
    original_of,
    require_read,
    without_derived,
)
from ckpt.runs.states import dangling
from ckpt.runs.states.listing import checkpoints_in, runs_in, runs_instead
from ckpt.runs.states.offer_order import TopologyFilter, is_fitting
from converters.detect import detect
from converters.errors import CheckpointError
from converters.storage import misplaced_files
from converters.words import shell_word

log = logging.getLogger("ckpt")
OWN_FOLDER = "checkpoints"  # that Accelerate and Lightning make in a run
_EXPECTED = "a checkpoint or a run that can be resumed"
_SIMILARITY = 0.75  # names over this, of 1, differ by a slip: chkpt-500 and checkpoint-500


def interpret(path: Path, tag: str | None, fits: TopologyFilter | None) -> tuple[str, str | None]:
    """The meaning for the caller: "run",
    "nothing" or "checkpoint" and its name in ``path``."""
    if not path.is_dir():
        return _meaning_without_folder(path, tag), None
    if not is_run(path) and (is_checkpoint(path) or signs.has_signs(path)):
        return _meaning_of_checkpoint(path, tag), None
    if tag is None:
        return _meaning_of_run(path), None

    return "checkpoint", _resolve_name(path, tag, fits)


def _meaning_without_folder(path: Path, tag: str | None) -> str:
    """What a path that is not a folder means: a file of Lightning's, or "nothing" yet."""
    if tag is None and path.is_file() and path.suffix == ".ckpt":
        return "checkpoint"

    if tag is not None or path.exists() or misplaced_files.link(path):
        raise detect(path).unlike(_EXPECTED)

    _require_new_name(path)
    return "nothing"


def _require_new_name(path: Path) -> None:
    """``CheckpointError`` for a path that is not there and was meant to be a checkpoint.

    A run begins under any other name, whatever lies beside it.
    """
    names = _checkpoint_names(path.parent)
    similar_names: list[str] = []
    if any(character.isdigit() for character in path.name):
        usual_names = filter(signs.is_name, names)
        similar_names = get_close_matches(path.name, usual_names, cutoff=_SIMILARITY)
    if not signs.is_name(path.name) and not similar_names:
        return

    missing = detect(path).unlike(_EXPECTED)
    if not names:
        raise missing
    suggestion = f"; did you mean {path.parent / similar_names[0]}?" if similar_names else ""
    raise CheckpointError(
        f"{path} does not exist; {path.parent} has {lineage.listed(names)}{suggestion}",
        "absent",
    )


def _checkpoint_names(folder: Path) -> list[str]:
    """The checkpoints in a folder, the oldest first; none if it cannot be looked into."""
    try:
        checkpoints = checkpoints_in(folder)
    except CheckpointError:
        return []
    return [checkpoint.name for checkpoint in sorted(checkpoints, key=order)]


def _meaning_of_checkpoint(path: Path, tag: str | None) -> str:
    """What the folder of a checkpoint means;
    "run" where another tag in it has to be chosen.

    ``CheckpointError`` if it was not saved under ``tag``.
    """
    manifest = open_checkpoint(path).manifest
    finding = None
    if tag is not None and manifest is None and not (path / tag).is_dir():
        finding = "it has no such folder"
    elif tag is not None and manifest is not None and tag != manifest.tag:
        finding = f"its tag is {manifest.tag}"
    if finding is not None:
        raise CheckpointError(f"{path} is not a checkpoint of tag {tag}: {finding}", "incomplete")

    if tag is None and manifest is None and _has_other_tags(path):
        return "run"

    return "checkpoint"


def _meaning_of_run(path: Path) -> str:
    """What a folder means that is not a checkpoint:
    "run" if it holds some, else "nothing"."""
    if signs.candidates(path):
        return "run"

    _require_beginning(path)
    return "nothing"


def _require_beginning(path: Path) -> None:
    """``CheckpointError`` for a checkpoint of another kind,
    which a new training would pass over.

    So is a file latest that names what is not there, and the folder that Accelerate and
    Lightning make for their checkpoints. Other runs, weights and other files that lie in
    a run's folder are only said.
    """
    runs = runs_in(path)
    if path / OWN_FOLDER in runs:
        raise CheckpointError(runs_instead(path, [path / OWN_FOLDER]), "incomplete")
    dangling.require_none(path)
    if runs:
        log.warning("no checkpoint to resume from: %s", runs_instead(path, runs))
        return

    detection = detect(path)
    if detection.kind.name in ("empty", "unknown"):
        if (finding := user_paths.torn_finding(path)) is not None:
            log.warning("no checkpoint to resume from: %s", finding)
        return

    instead = detection.unlike(_EXPECTED)
    if detection.kind.trouble == "unsupported":
        raise instead
    log.warning("no checkpoint to resume from: %s", instead)


def _has_other_tags(path: Path) -> bool:
    """Whether DeepSpeed's ``latest`` names a tag that is not whole or not there,
    and there are others."""
    tags = [inner_folder for inner_folder in signs.candidates(path) if is_checkpoint(inner_folder)]
    is_dangling = dangling.finding(path) is not None
    if is_numbered(path) or len(tags) < (1 if is_dangling else 2):
        return False

    try:
        completeness.prove(path)
    except CheckpointError as error:
        require_read(error)
        if not is_dangling:  # which the offers say
            log.warning("%s: %s", path, error)
        return True

    return False


def _tags(checkpoint: RunCheckpoint) -> list[str]:
    """The tag in its manifest, and of several engines the last part,
    which they have in common."""
    tag = checkpoint.manifest.tag if checkpoint.manifest is not None else None
    return [tag, tag.rpartition("/")[2]] if tag is not None else []


def _resolve_name(path: Path, tag: str, fits: TopologyFilter | None) -> str:
    """The name of the checkpoint that a tag, name, step or pointer means in a run."""
    run = Run(path)
    if tag in POINTERS:
        return run.find(tag).name

    checkpoints = run.checkpoints()
    matches = _matches(tag, checkpoints)
    if len(matches) > 1 and fits is not None:  # one may be resharded from the other
        matches = [
            checkpoint
            for checkpoint in matches
            if is_fitting(checkpoint, original_of(checkpoint, checkpoints), fits)
        ] or matches
    if len(matches) > 1:
        matches = without_derived(matches, checkpoints)
    if tag.isdecimal():  # a step, of which a copy is called otherwise
        matches = numbered(matches)
    if len(matches) != 1:
        names = ", ".join(checkpoint.name for checkpoint in matches)
        matches_text = names or "no checkpoint"
        raise CheckpointError(
            f"{path} has {matches_text} for {tag}; see ckpt ls {shell_word(path)}", "incomplete"
        )

    return matches[0].name


def _matches(tag: str, checkpoints: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """The checkpoints that have a tag, name or step; without a folder of that name,
    rather those of the line that saved last."""
    matches = [
        checkpoint
        for checkpoint in checkpoints
        if tag in (checkpoint.name, str(checkpoint.step), *_tags(checkpoint))
    ]
    if tag in [checkpoint.name for checkpoint in matches]:
        return matches

    # not the engine's state that save_model() left in the run
    matches = [
        checkpoint
        for checkpoint in matches
        if (checkpoint.manifest or checkpoint.record) is not None or is_numbered(checkpoint.folder)
    ] or matches
    line_members = members(checkpoints)
    return [
        checkpoint
        for checkpoint in matches
        if checkpoint.manifest is None or checkpoint in line_members
    ] or matches
