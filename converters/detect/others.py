"""The kinds that no other room reads: nothing,
an empty folder, a folder of checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from converters.detect import filenames
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.storage import misplaced_files, stores
from converters.storage.url_path import UrlPath


def nothing(look: Look) -> str | None:
    """Nothing lies there; a link that leads nowhere, or a download to there, is named."""
    if stores.exists(look.path):
        return None
    misplaced = misplaced_files.link(look.path) or misplaced_files.download_to(look.path)
    return misplaced or _repository(look.path)


def _repository(path: Path) -> str:
    """The end of a sentence for what looks like the name of a repository; nothing else."""
    name = path.as_posix()
    is_one = not isinstance(path, UrlPath) and filenames.REPOSITORY.fullmatch(name)
    if not is_one or stores.exists(path.parent):
        return ""
    return f"; if it is a repository of the Hugging Face Hub, ckpt pull {name} DIR fetches it"


def unfinished(look: Look) -> str | None:
    """A download that did not end: the file itself, or one in the folder."""
    if look.is_unfinished:
        return "it is a download that did not end: download it again"
    missing = misplaced_files.missing(look.path) if look.is_folder else ""
    return missing.removeprefix("; ") or None


def archives(look: Look) -> str | None:
    """A folder with an archive in it, and nothing known beside it; how it is unpacked."""
    name = look.match(filenames.ARCHIVE)
    return f"{name} in it is an archive: {filenames.unpacking(look.path / name)}" if name else None


def empty(look: Look) -> str | None:
    """A folder with nothing in it."""
    return "" if look.is_folder and not look.names else None


def unknown(look: Look) -> str | None:
    """A folder of no known kind: the first names in it,
    and what the folders among them hold."""
    return ", ".join(map(partial(_shown, look), look.names[:3])) if look.is_folder else None


def _shown(look: Look, name: str) -> str:
    """A name in a folder: ``checkpoints/ (step_2, step_4)`` for a folder."""
    try:
        inner = Look(look.path / name)
        names = inner.names[:3]
    except OSError:  # a folder that may not be looked into
        return name

    if not inner.is_folder:
        return name
    return f"{name}/ ({', '.join(names)})" if names else f"{name}/"


def other_file(look: Look) -> str | None:
    """Any other file."""
    is_other = stores.exists(look.path) and not look.is_folder and not look.is_unfinished
    return "" if is_other else None


NOTHING = (
    Kind(
        name="nothing",
        title="nothing",
        recognized_by="nothing is there, or a link that leads nowhere",
        sign=nothing,
        statement="does not exist; expected {expected}{evidence}",
        refusal="{statement}",
        trouble="absent",
    ),
)

FIRST = (
    Kind(
        name="unfinished-download",
        title="download that did not end",
        recognized_by="`.incomplete`, `.part` and the like, of the path or in it",
        sign=unfinished,
        statement="is not whole: {evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="archives",
        title="folder with an archive",
        recognized_by="a file with the suffix of an archive, and nothing known beside it",
        sign=archives,
        statement="holds no checkpoint; {evidence}",
        refusal="{statement}",
    ),
)

KINDS = (
    Kind(
        name="other-file",
        title="file of no known kind",
        recognized_by="any other file",
        sign=other_file,
        statement="is a file of no known kind; expected {expected}",
        refusal="{statement}",
    ),
    Kind(
        name="empty",
        title="empty folder",
        recognized_by="no file and no folder in it",
        sign=empty,
        statement="is an empty folder; expected {expected}: name another folder, or save or copy "
        "one to there",
        refusal="{statement}",
    ),
    Kind(
        name="unknown",
        title="folder of no known kind",
        recognized_by="any other folder",
        sign=unknown,
        statement="holds no checkpoint; it holds {evidence}: name {expected}",
        refusal="{statement}",
    ),
)
