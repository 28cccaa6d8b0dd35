"""Which checkpoints of a run are copies by hand of others (``cp -r``), or links to them.

    committed    its manifest is of the save of the other one, and of another name than its folder
    complete     its name is none that a trainer gives, or its number is not the Trainer's step,
                 and the files that a resume reads are those of one with such a name: by names,
                 sizes, and the CRC32s in torch zips

A copy is as good as its original, and is never taken in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.runs import digests
from ckpt.runs import manifest as manifests
from ckpt.runs.foreign import signs
from ckpt.runs.recognition import is_numbered, is_set_aside, step_in
from ckpt.runs.run import RunCheckpoint, original_of
from converters.detect.filenames import TRAINER_STATE
from converters.storage import local
from converters.words import some, verb

_MAX_READ = 1 << 20  # bytes of a file that has no CRC32s, from each end
# by whether it is a link
_FORMS = {True: ("is a link to", "are links to"), False: ("is a copy of", "are copies of")}
Originals = dict[Path, RunCheckpoint]


def originals(checkpoints: Sequence[RunCheckpoint]) -> Originals:
    """Of each copy among these, by its folder, the one that it is a copy of, in any
    order of these.

    That one is no copy itself: a copy of a copy is one of the original. Of copies whose
    original is gone one stands for it. What vanishes meanwhile, or cannot be read, is no
    copy.
    """
    suspects: list[RunCheckpoint] = []
    candidates: list[RunCheckpoint] = []
    for checkpoint in checkpoints:  # most are no suspects, and are compared with none
        (suspects if _is_suspect(checkpoint) else candidates).append(checkpoint)

    found_originals: Originals = {}
    for checkpoint in sorted(suspects, key=_stand_in_rank):
        try:
            original = next((entry for entry in candidates if _is_copy(checkpoint, entry)), None)
        except OSError:
            original = None
        if original is None:
            candidates.append(checkpoint)
        else:
            found_originals[checkpoint.folder] = original

    return found_originals


def _is_suspect(checkpoint: RunCheckpoint) -> bool:
    try:
        return _may_be_copy(checkpoint)
    except OSError:
        return False


def _stand_in_rank(checkpoint: RunCheckpoint) -> tuple[bool, int, int, str]:
    """The order in which copies stand for an original that is gone: those with a name
    that trainings give, of the highest number, before those that are called after
    another one."""
    name = checkpoint.name
    return not signs.is_usual(name), -(signs.number_in(name) or 0), len(name), name


def origins(checkpoints: Sequence[RunCheckpoint]) -> Originals:
    """The originals of copies by hand, and of what ckpt made of others."""
    return originals(checkpoints) | {
        checkpoint.folder: original
        for checkpoint in checkpoints
        if (original := original_of(checkpoint, checkpoints)) is not None
    }


def remarks(copied: Originals) -> list[str]:
    """A line on each original: what is a link to it, and what is a copy of it."""
    names: dict[str, dict[bool, list[str]]] = {}
    for folder, original in sorted(copied.items()):
        sorts = names.setdefault(original.name, {})
        sorts.setdefault(folder.is_symlink(), []).append(folder.name)

    lines = []
    for original_name, sorts in names.items():
        forms = [
            f"{some(folder_names)} {verb(len(folder_names), *words)} {original_name}"
            for is_link, words in _FORMS.items()
            if (folder_names := sorts.get(is_link))
        ]
        lines.append(" and ".join(forms))

    return lines


def sentence(checkpoint: RunCheckpoint, original: RunCheckpoint) -> str:
    """A description of a copy, as words after its name."""
    form = "link to" if checkpoint.folder.is_symlink() else "copy of"
    return f"{form} {original.name}"


def _may_be_copy(checkpoint: RunCheckpoint) -> bool:
    """Whether a checkpoint is a link, or was not saved under the name of its folder."""
    if checkpoint.folder.is_symlink():
        return True
    if checkpoint.manifest is not None:
        return not checkpoint.original

    is_judged = checkpoint.why == manifests.ABSENT and checkpoint.record is None
    if is_judged and is_numbered(checkpoint.folder):  # its number may be made up
        return _is_of_another_step(checkpoint.folder)
    has_usual_name = signs.is_usual(checkpoint.folder.name) or is_set_aside(checkpoint.folder)
    return is_judged and not has_usual_name


def _is_of_another_step(folder: Path) -> bool:
    """Whether the Trainer says another step than the name:
    ``cp -r checkpoint-6 checkpoint-8``."""
    if not (folder / TRAINER_STATE).is_file():
        return False

    from ckpt.runs.foreign import completeness

    return completeness.step_of(folder) not in (None, step_in(folder.name))


def _is_copy(checkpoint: RunCheckpoint, candidate: RunCheckpoint) -> bool:
    """Whether one that may be a copy is one of the other checkpoint."""
    if checkpoint.folder.is_symlink():
        return not candidate.folder.is_symlink() and checkpoint.folder.resolve() == (
            candidate.folder.resolve()
        )
    if not candidate.original:
        return False
    if checkpoint.manifest is not None:
        return _is_of_one_save(checkpoint, candidate)

    is_named_after = _is_named_after(checkpoint.folder, candidate.folder)
    return is_named_after and _is_same(checkpoint.folder, candidate.folder)


def _is_of_one_save(checkpoint: RunCheckpoint, candidate: RunCheckpoint) -> bool:
    """Whether a manifest is of the save of another checkpoint.

    One that was copied before it was adopted has an id of its own.
    """
    manifest, other_manifest = checkpoint.manifest, candidate.manifest
    if manifest is None:
        return False
    if other_manifest is not None and manifest.save == other_manifest.save:
        return True

    is_named = manifest.name == candidate.name and candidate.step in (None, manifest.step)
    return is_named and _is_same(checkpoint.folder, candidate.folder)


def _is_named_after(folder: Path, candidate: Path) -> bool:
    """Whether the name of the other folder is a trainer's,
    or the beginning of this one's."""
    if not (folder.is_dir() and candidate.is_dir()):
        return False
    return signs.is_usual(candidate.name) or folder.name.startswith(candidate.name)


def _is_same(folder: Path, candidate: Path) -> bool:
    """Whether two folders hold the same files, as far as a resume reads them."""
    from ckpt.runs.foreign import resume_files

    files = resume_files.fingerprint(folder)
    if not files or files != resume_files.fingerprint(candidate):
        return False

    return all(_has_same_bytes(folder / name, candidate / name) for name, _ in files)


def _has_same_bytes(path: Path, candidate: Path) -> bool:
    """Whether two files of one size are equal:
    by the CRC32s that they have, or at both ends."""
    with open(path, "rb") as stream, open(candidate, "rb") as other_stream, local.naming_path(path):
        directory = digests.directory_of(stream)
        other_directory = digests.directory_of(other_stream)
        if directory is not None and other_directory is not None:
            return directory.digest == other_directory.digest

        nbytes = path.stat().st_size
        for start in {0, max(0, nbytes - _MAX_READ)}:
            stream.seek(start)
            other_stream.seek(start)
            if stream.read(_MAX_READ) != other_stream.read(_MAX_READ):
                return False

    return True
